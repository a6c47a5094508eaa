"""A Trainer's data gives the rows of a fit or proof: which are held out, and the batches that its evaluation makes."""

from __future__ import annotations

import inspect
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import GenerationConfig

from pedyra.errors import UserError
from pedyra.fitting.fit import CALIBRATING, Rows
from pedyra.fitting.judge import Batch
from pedyra.fitting.logits import writes
from pedyra.fitting.modes import evaluating
from pedyra.fitting.request import FitRequest
from pedyra.fitting.search import FEW, LEAST

logger = logging.getLogger(__name__)

BATCH = 8
"""A batch has at most so many rows: the proof is paired by batches, and small ones make a better standard error."""
BATCHES = 2 * FEW
"""Few held-out rows make at least this number of batches, as far as they go in pairs."""
CALIBRATION = 128
"""A calibration takes at most this number of batches."""
LEARNED = 0.1
"""From this part of the held-out rows on, a warning says that they were trained on."""
MOST_HELD = 8192
"""At most this number of held-out rows prove by default; a fit takes as many as it has the time for."""
CONTINUED_ROWS = 512
"""At most this number of prompts calibrate, and as many prove, where the adapter has to go on from them first."""
WRITTEN = 64
"""It writes at most this number of tokens after each."""
GENERATED_ROWS = 128
"""At most this number of completions calibrate, and as many prove, where the Trainer generates them."""


def fit_rows(trainer: Any, data: Any, request: FitRequest) -> Rows:
    """Make the batches of a fit: rows like those of the training calibrate, and held-out rows prove."""
    completions, processes = _completions(trainer), trainer.accelerator.num_processes
    calibrating, proving = request.rows or CALIBRATING, request.rows or MOST_HELD
    if completions:  # the batches of all processes have to hold whole groups of completions
        group = completions // math.gcd(completions, processes)
        size = small = max(group, trainer.args.per_device_eval_batch_size // group * group)
        step = size * processes // completions
        calibrating = proving = min(calibrating, max(2 * BATCH, GENERATED_ROWS // completions, 2 * step))
    name, training, train_places, heldout, heldout_places = _sample(trainer, data, calibrating, proving)
    unlabelled = not completions and _is_unlabelled(trainer, heldout, heldout_places)
    if unlabelled and writes(trainer.accelerator.unwrap_model(trainer.model)) and request.rows is None:
        train_places, heldout_places = train_places[:CONTINUED_ROWS], heldout_places[:CONTINUED_ROWS]
    if not completions:
        size, room = _held_batch(trainer, len(heldout_places)), trainer.args.per_device_train_batch_size
        small = max(min(BATCH, room), min(room, len(train_places) // FEW) if _compares_rows(trainer) else 0)
    prompts = completions or 1
    train_places = _cut_evenly(trainer, train_places[: CALIBRATION * small // prompts], small * processes // prompts)
    heldout_places = _cut_evenly(trainer, heldout_places, size * processes // prompts)
    for rows, lacking in ((train_places, "calibrate"), (heldout_places, "prove by")):
        if not rows:
            raise UserError(f"{name} leaves no rows to {lacking}; give more")
    calibration = _batches(trainer, training, train_places, small, completes=bool(completions))
    proof = _batches(trainer, heldout, heldout_places, size, completes=bool(completions))
    return Rows(
        calibration=_label_prompts(trainer, calibration) if unlabelled else calibration,
        heldout=_label_prompts(trainer, proof) if unlabelled else proof,
        unlabelled=unlabelled,
        name=name,
        counts=(len(train_places), len(heldout_places)),
        a_batch=max(1, size * processes // prompts),
    )


def proof_rows(trainer: Any, data: Any, most: int | None) -> Rows:
    """Make batches of the held-out rows alone, at most `most`; the model as it is goes on from prompts."""
    if is_surrogate(trainer):
        raise UserError(
            f"the loss of {type(trainer).__name__} says nothing about held-out rows, so it proves nothing; ask a "
            f"Trainer of the answers themselves (SFTTrainer with its default loss)"
        )
    name, heldout, _ = _held_out(trainer, data, "the proof")
    heldout, heldout_places = _shuffle(heldout, most, torch.Generator().manual_seed(trainer.args.seed))
    size = _held_batch(trainer, len(heldout_places))
    heldout_places = _cut_evenly(trainer, heldout_places, size * trainer.accelerator.num_processes)
    if len(heldout_places) < LEAST * size:
        raise UserError(f"{name} has {len(heldout_places)} rows, and a proof takes {LEAST * size} or more; give more")
    batches = _batches(trainer, heldout, heldout_places, size)
    unlabelled = _is_unlabelled(trainer, heldout, heldout_places)
    batches = _label_prompts(trainer, batches) if unlabelled else batches
    return Rows(calibration=(), heldout=batches, unlabelled=unlabelled, name=name, counts=(0, len(heldout_places)))


def training_rows(trainer: Any) -> list[Batch]:
    """Make batches of rows of the training, as many as calibrate a fit; none where the Trainer has no such rows."""
    if trainer.train_dataset is None:
        return []
    size = min(BATCH, trainer.args.per_device_train_batch_size)
    generator = torch.Generator().manual_seed(trainer.args.seed)
    training, train_places = _shuffle(trainer.train_dataset, CALIBRATION * size, generator)
    train_places = _cut_evenly(trainer, train_places, size * trainer.accelerator.num_processes)
    return _batches(trainer, training, train_places, size)


def _cut_evenly(trainer: Any, rows: list[int], step: int) -> list[int]:
    """Cut the rows to a multiple of `step`, so that every process has as many batches, and no row comes twice."""
    return rows if trainer.accelerator.num_processes == 1 else rows[: len(rows) // max(1, step) * max(1, step)]


def _held_batch(trainer: Any, rows: int) -> int:
    """Return how many of the held-out rows make a batch."""
    most = trainer.args.per_device_eval_batch_size
    size = max(min(2, most), min(BATCH, most, rows // BATCHES))
    return max(size, min(most, rows // FEW)) if _compares_rows(trainer) else size


def _compares_rows(trainer: Any) -> bool:
    """Tell whether the loss may compare the rows of a batch, as most of sentence-transformers do. Nearly any adapter
    finds the right one among eight rows, so the batches are those that the Trainer asks for."""
    return any(kind.__module__.startswith("sentence_transformers.") for kind in type(trainer).__mro__)


def least_held_out(eval_batch_size: int) -> int:
    """Return of how many held-out rows a fit makes `LEAST` batches."""
    return (LEAST - 1) * min(2, eval_batch_size) + 1


def _completions(trainer: Any) -> int:
    """Return how often a Trainer that is judged by what it generates completes each prompt; 0: it does not."""
    if not callable(getattr(trainer, "_generate_and_score_completions", None)):
        return 0
    return getattr(trainer, "num_generations_eval", None) or getattr(trainer, "num_generations", None) or 0


def is_surrogate(trainer: Any) -> bool:
    """Tell whether the loss that was trained says nothing about held-out rows, so that a divergence is measured."""
    return _completions(trainer) > 0 or getattr(trainer.args, "loss_type", None) == "dft"


def _held_out(trainer: Any, data: Any, what: str) -> tuple[str, Any, Any]:
    """Return name and rows of what is held out to judge `what`, and the rows of training; None: they are the same."""
    training = trainer.train_dataset
    if data is not None and data is not training:
        parts = data if isinstance(data, Mapping) else {"": data}
        name, heldout = "data", _join({key: _prepare(trainer, part) for key, part in parts.items()})
    elif data is None and trainer.eval_dataset is not None:
        name, heldout = "eval_dataset", _join(trainer.eval_dataset)
    else:
        name, heldout = "train_dataset", training
        if training is None:
            raise UserError("the Trainer has no eval_dataset and no train_dataset; give rows as data=")
    if heldout is not training:
        return name, heldout, training
    warnings.warn(
        f"{what} is judged by rows of the train_dataset, which the adapter knows better than others, since it was "
        f"trained on them; give other rows of its task as data=",
        stacklevel=6,
    )
    return name, heldout, None


def _sample(trainer: Any, data: Any, calibrating: int, proving: int) -> tuple[str, Any, list[int], Any, list[int]]:
    """Return the name of the held-out rows, and data sets and places of at most so many to calibrate and to prove."""
    name, heldout, training = _held_out(trainer, data, "the fit")
    generator = torch.Generator().manual_seed(trainer.args.seed)
    if training is None:
        heldout, order = _shuffle(heldout, calibrating + proving, generator)
        third = min(calibrating, len(order) // 3)  # one set of rows, of which a third calibrates
        return name, heldout, order[:third], heldout, order[third:][:proving]
    training, train_places = _shuffle(training, calibrating, generator)
    heldout, heldout_places = _shuffle(heldout, proving, generator)
    return name, training, _apart(training, train_places, heldout, heldout_places, name), heldout, heldout_places


def _apart(training: Any, train_places: list[int], heldout: Any, heldout_places: list[int], name: str) -> list[int]:
    """Return the places of training rows without those that are held out too: repair would learn what the proof asks.
    Where most are, as where short texts repeat, all stay."""
    proving = set(_contents(heldout, heldout_places))
    rows = zip(train_places, _contents(training, train_places), strict=True)
    apart = [place for place, row in rows if row not in proving]
    shared = len(train_places) - len(apart)
    # Fewer than four may be there by chance, as short texts are.
    overlap = min(1.0, shared / len(train_places) * len(training) / len(heldout_places)) if shared >= 4 else 0.0
    if overlap >= LEARNED:
        logger.warning(
            "fit: %d of %d rows of the train_dataset are in %s too. About %.0f%% of the held-out rows were trained on, "
            "so the adapter knows them better than others; hold out rows that it was not trained on",
            *(shared, len(train_places), name, 100 * overlap),
        )
    return apart if 2 * len(apart) >= len(train_places) else train_places


def _contents(dataset: Any, places: Sequence[int]) -> list[str]:
    """Return each of these rows as JSON, so that equal rows are equal strings."""
    return [json.dumps(row, sort_keys=True, default=_plain) for row in _select(dataset, list(places))]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else uuid4().hex  # an image is like no other


def _batches(trainer: Any, dataset: Any, places: list[int], size: int, *, completes: bool = False) -> list[Batch]:
    """Make this process's batches of these rows as the Trainer's own evaluation does, in the host's memory.
    `completes`: the whole adapter writes the completions, and a smaller one is judged by whether it writes the same."""
    settings = {
        "per_device_eval_batch_size": size,
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None,
        "dataloader_multiprocessing_context": None,
        "dataloader_drop_last": False,
        "dataloader_pin_memory": False,
    }
    before = {name: getattr(trainer.args, name) for name in settings if hasattr(trainer.args, name)}
    try:
        vars(trainer.args).update({name: settings[name] for name in before})
        batches = []
        for batch in trainer.get_eval_dataloader(_select(dataset, places)):  # which has sent it to the device
            batches.append(send_to_device(batch, "cpu") if isinstance(batch, Mapping) else batch)
    finally:
        vars(trainer.args).update(before)
    if completes:
        return [_complete(trainer, batch) for batch in batches]
    if odd := [type(batch).__name__ for batch in batches if not isinstance(batch, Mapping)]:
        raise UserError(
            f"the batches of {type(trainer).__name__} are each a {odd[0]}, and a fit takes dicts of tensors; save the "
            f"adapter and run `pedyra fit FOLDER --data ROWS`"
        )
    if len(batches) != math.ceil(len(places) / (size * trainer.accelerator.num_processes)):
        raise UserError(
            f"{type(trainer).__name__}.get_eval_dataloader gives {len(batches)} batches for {len(places)} rows in "
            f"batches of {size}, so rows cannot be kept apart; let it take the data set that it is given, and the "
            f"batch size of its arguments"
        )
    return batches


def _complete(trainer: Any, prompts: Any) -> dict[str, Tensor]:
    """Have the Trainer generate a completion of each prompt of a batch; the labels are the completion's tokens."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with evaluating(model), torch.no_grad():
        result = trainer._prepare_inputs(prompts)
    if images := [key for key in result if "pixel" in key or "image" in key]:
        raise UserError(
            f"the prompts have images ({images[0]}), and a fit of {type(trainer).__name__} is judged by text alone; "
            f"save the adapter and run `pedyra fit FOLDER --data ROWS`"
        )
    on = result["completion_mask"] * result.get("tool_mask", torch.ones_like(result["completion_mask"]))
    labels = result["completion_ids"].masked_fill(on == 0, -100)
    batch = {
        "input_ids": torch.cat([result["prompt_ids"], result["completion_ids"]], 1),
        "attention_mask": torch.cat([result["prompt_mask"], result["completion_mask"]], 1),
        "labels": torch.cat([torch.full_like(result["prompt_ids"], -100), labels], 1),
    }
    return {key: value.cpu() for key, value in batch.items()}


def _is_unlabelled(trainer: Any, heldout: Any, heldout_places: list[int]) -> bool:
    """Tell whether the held-out rows are inputs alone: all that the model takes, and nothing that says what is right. A
    model of one output has no classes (the pairs of a reward model)."""
    if not heldout_places or trainer.accelerator.num_processes > len(heldout_places):
        return False
    base = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    batch = _batches(trainer, heldout, heldout_places[:1], 1)[0]
    keys = {name for name, value in batch.items() if value is not None}  # a collator may give labels that are None
    targets = {"labels", "label", "label_ids", "start_positions", "end_positions", *(trainer.label_names or ())}
    takes = inspect.signature(base.forward).parameters.keys()
    return keys <= takes and not keys & targets and getattr(getattr(base, "config", None), "num_labels", 2) != 1


def _label_prompts(trainer: Any, batches: list[Batch]) -> list[Batch]:
    """Label batches of prompts by what the model generates from them, greedily; others stay as they are."""
    if not writes(trainer.accelerator.unwrap_model(trainer.model)):
        return batches
    return [_continue_prompts(trainer, batch) if batch.get("labels") is None else batch for batch in batches]


def _continue_prompts(trainer: Any, batch: Batch) -> Batch:
    model = trainer.accelerator.unwrap_model(trainer.model)
    ids, config = batch["input_ids"], model.config
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    longest, most = int(mask.sum(1).max()), getattr(config, "max_position_embeddings", None) or math.inf
    room = WRITTEN if config.is_encoder_decoder else min(WRITTEN, most - longest)
    if longest == 0 or room < 1:
        raise UserError(
            f"a prompt of {longest} tokens leaves the model nothing to go on from, or no room of its {most} tokens; "
            f"leave out empty prompts, and cut long ones (--max-length)"
        )
    own = getattr(trainer.processing_class, "eos_token_id", None), model.generation_config.eos_token_id
    ends = {end for each in own for end in (each if isinstance(each, list) else [each]) if end is not None}
    pad = getattr(trainer.processing_class, "pad_token_id", None) or 0
    tokens = {"eos_token_id": [*ends] or None, "pad_token_id": pad}
    settings = GenerationConfig(max_new_tokens=room, do_sample=False, num_beams=1, use_cache=True, **tokens)
    prompts = [row[on] for row, on in zip(ids, mask, strict=True)]
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if not config.is_encoder_decoder:  # it goes on from the last token
        inputs = _pad(prompts, pad, "left")
    with evaluating(model), torch.no_grad(), trainer.accelerator.autocast():
        result = model.generate(**send_to_device(inputs, trainer.args.device), generation_config=settings).cpu()
    result = result[:, 1 if config.is_encoder_decoder else inputs["input_ids"].shape[1] :]
    after_end = torch.isin(result, torch.tensor([*ends], dtype=result.dtype)).cumsum(1).cumsum(1) > 1
    texts = [row[~over] for row, over in zip(result, after_end, strict=True)]
    if config.is_encoder_decoder:
        return {**batch, "labels": pad_sequence(texts, batch_first=True, padding_value=-100)}
    rows = [torch.cat(both) for both in zip(prompts, texts, strict=True)]
    labels = [torch.cat([torch.full_like(row, -100), text]) for row, text in zip(prompts, texts, strict=True)]
    return {**_pad(rows, pad, "right"), "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}


def _pad(rows: list[Tensor], pad: int, side: str) -> dict[str, Tensor]:
    ids, mask = pad_sequence(rows, True, pad, side), pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
    return {"input_ids": ids, "attention_mask": mask}


def _prepare(trainer: Any, data: Any) -> Any:
    """Prepare rows as the Trainer takes them: TRL's tokenise them themselves, unless the collator does."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    eval_packing = getattr(trainer.args, "eval_packing", None)
    arguments = {
        "dataset": data,
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False) if eval_packing is None else eval_packing,
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "fit",
    }
    takes = () if prepare is None else inspect.signature(prepare).parameters
    skips = getattr(trainer, "_is_vision_dataset", False) or getattr(trainer, "_skip_prepare_dataset", False)
    if prepare is None or not set(takes) <= arguments.keys() or skips:
        return data
    if isinstance(data, list):  # TRL takes rows as a data set alone
        from datasets import Dataset

        arguments["dataset"] = Dataset.from_list(data)
    prepared = prepare(**{name: arguments[name] for name in takes})
    if getattr(trainer, "precompute_ref_logps", False):  # DPO's own evaluation does so for its reference
        prepared = trainer._precompute_ref_logps(prepared, "fit", trainer.args.per_device_eval_batch_size)
    return prepared


def _join(dataset: Any) -> Any:
    """Make one data set of several by name."""
    parts: list[Any] = list(dataset.values()) if isinstance(dataset, Mapping) and dataset else [dataset]
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _shuffle(dataset: Any, most: int | None, generator: torch.Generator) -> tuple[Any, list[int]]:
    """Return a data set with a length, and random places of at most `most` of its rows; of a stream its first rows."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        dataset = list(islice(dataset, most))
    return dataset, torch.randperm(len(dataset), generator=generator)[:most].tolist()


def _select(dataset: Any, indices: list[int]) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
