"""The rows of a fit, out of a Trainer's data: which are held out, and the batches that its own evaluation makes."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import operator
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice, zip_longest
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import IterableDataset, Subset
from transformers import ProcessorMixin

from pedyra.errors import UserError
from pedyra.fitting.calibration import evaluating
from pedyra.fitting.fit import GeneralRows, Rows
from pedyra.fitting.general import check_writes, text_batches, texts_of
from pedyra.fitting.judge import Batch
from pedyra.fitting.search import FEW, LEAST
from pedyra.fitting.wanted import Wanted
from pedyra.trainer.judge import TextJudge, TrainerJudge

logger = logging.getLogger(__name__)

BATCH = 8
"""Rows of a batch at most: the proof is paired batch by batch, so small ones make a better standard error."""
BATCHES = 2 * FEW
"""Held-out batches that are made of few rows at least, as far as they go in pairs."""
CALIBRATION = 128
"""Batches of calibration at most."""
SOME = 16
"""Rows by which two data sets of one length are compared."""
LEARNED = 0.1
"""Part of the held-out rows that were trained on, from which a warning says so."""
REPEATED = 4
"""Different rows in both sets from which one may say so: a few are there by chance, as short texts are."""
COMPARED = 0.2
"""By how much more than in any of its parts the loss of a batch is, if it compares rows: a guess among 64 instead of
among 8 has twice as much. A mean over rows, weighted or not, is between those of the parts."""
GENERATED_ROWS = 128
"""Completions at most to calibrate with, and for the proof, where the Trainer generates what it is judged on."""


def fit_rows(judge: TrainerJudge, data: Any, wanted: Wanted) -> Rows:
    """The batches of a fit: rows like those of the training to calibrate with, and held-out rows to prove by."""
    trainer = judge.trainer
    completions, processes = _completions(trainer), trainer.accelerator.num_processes
    if completions:  # the batches of all processes have to hold whole groups of completions
        group = completions // math.gcd(completions, processes)
        size = small = max(group, trainer.args.per_device_eval_batch_size // group * group)
        step = size * processes // completions
        most = min(wanted.rows, max(2 * BATCH, GENERATED_ROWS // completions, 2 * step))
        name, training, seen, held, left = _drawn(trainer, data, most)
    else:
        name, training, seen, held, left = _drawn(trainer, data, wanted.rows)
        small, size = min(BATCH, _trained_batch(trainer)), min(BATCH, trainer.args.per_device_eval_batch_size)
        size = max(min(2, size), min(size, len(left) // BATCHES))
        if processes == 1 and not is_surrogate(trainer) and _compares_rows(judge, held, left, size):
            size = max(size, min(trainer.args.per_device_eval_batch_size, len(left) // FEW))
            small = max(small, min(_trained_batch(trainer), len(seen) // FEW))

    def shared(rows: list[int], size: int) -> list[int]:
        """As many batches in every process, and no row twice."""
        step = max(1, size * processes // (completions or 1)) if processes > 1 else 1
        return rows[: len(rows) // step * step]

    parts = {
        "calibration": (training, shared(seen[: CALIBRATION * small // (completions or 1)], small), small),
        "held": (held, shared(left, size), size),
    }
    batches, counts = {}, {}
    for part, (dataset, indices, size) in parts.items():
        if not indices:
            raise UserError(f"{name} leaves no rows to {'prove by' if part == 'held' else 'calibrate'}; give more")
        batches[part] = _batches(trainer, _selected(dataset, indices), size, bool(completions))
        counts[part] = f"{len(indices):,}"
    return Rows(**batches, told=f"{counts['calibration']} to calibrate, {counts['held']} of {name} to prove by")


def proof_rows(judge: TrainerJudge, data: Any, most: int | None) -> tuple[list[Batch], int]:
    """Batches of the held-out rows alone, at most so many, for what needs no gradient; and their rows, of all
    processes."""
    trainer = judge.trainer
    if is_surrogate(trainer):
        raise UserError(
            f"the loss of {type(trainer).__name__} says nothing about held-out rows, so it proves nothing; ask a "
            f"Trainer of the answers themselves (SFTTrainer with its default loss)"
        )
    name, held, _ = _held_out(trainer, data, "the proof")
    held, left = _shuffled(held, most, torch.Generator().manual_seed(trainer.args.seed))
    size, processes = min(BATCH, trainer.args.per_device_eval_batch_size), trainer.accelerator.num_processes
    size = max(min(2, size), min(size, len(left) // BATCHES))
    if processes == 1 and _compares_rows(judge, held, left, size):
        size = max(size, min(trainer.args.per_device_eval_batch_size, len(left) // FEW))
    if processes > 1:  # as many batches in every process, and no row twice
        left = left[: len(left) // (size * processes) * (size * processes)]
    if len(left) < LEAST * size:
        raise UserError(f"{name} has {len(left)} rows, and a proof takes {LEAST * size} or more; give more")
    return _batches(trainer, _selected(held, left), size, False), len(left)


def training_rows(trainer: Any) -> list[Batch]:
    """Batches of rows of the training, as many as calibrate a fit; none where the Trainer has no such rows."""
    if trainer.train_dataset is None:
        return []
    size, processes = min(BATCH, _trained_batch(trainer)), trainer.accelerator.num_processes
    generator = torch.Generator().manual_seed(trainer.args.seed)
    training, seen = _shuffled(trainer.train_dataset, CALIBRATION * size, generator)
    step = size * processes if processes > 1 else 1  # as many batches in every process, and no row twice
    return _batches(trainer, _selected(training, seen[: len(seen) // step * step]), size, False)


def _compares_rows(judge: TrainerJudge, held: Any, left: list[int], size: int) -> bool:
    """Whether the loss compares the rows of a batch with each other, as a contrastive one does: in a batch of the
    Trainer's own size it is larger than in any part of it. Batches of few rows would ask an easier question.

    It is not asked where labels are tokens: that loss is a mean over them.
    """
    whole = min(judge.trainer.args.per_device_eval_batch_size, len(left))
    if whole <= size:
        return False
    rows = _selected(held, left[:whole])
    batch, *parts = (*_batches(judge.trainer, rows, whole, False)[:1], *_batches(judge.trainer, rows, size, False))
    parts = [part for part in parts if judge.samples(part)]
    if len(parts) < 2 or any(key.endswith("labels") and getattr(batch[key], "ndim", 0) > 1 for key in batch):
        return False
    try:
        together, *apart = judge.losses([batch, *parts], nullcontext)
    except (torch.OutOfMemoryError, ValueError):  # no room for it, or a loss that is not finite, which is told later
        return False
    most = max(apart)
    if together <= (1 + COMPARED) * most or math.isclose(together, sum(apart), rel_tol=COMPARED):  # or a sum over rows
        return False
    logger.warning(
        "fit: the loss of %d rows together is %.4g, and of %d at a time at most %.4g, so it compares rows with each "
        "other, and the batches are as large as the rows allow, and at most the Trainer's own",
        *(whole, together, size, most),
    )
    return True


def _trained_batch(trainer: Any) -> int:
    """Rows of a backward pass that there is room for: what `auto_find_batch_size` has come down to, where it is on."""
    args = trainer.args
    if not args.auto_find_batch_size:
        return args.per_device_train_batch_size
    return min(args.per_device_train_batch_size, max(1, trainer._train_batch_size // max(1, args.n_gpu)))


def least_held_out(eval_batch_size: int) -> int:
    """Held-out rows of which a fit makes `LEAST` batches."""
    return (LEAST - 1) * min(2, eval_batch_size) + 1


def general_rows(trainer: Any, model: Any, general: Any, most: int) -> GeneralRows:
    """Half of the general texts for gradients, and half for the proof: this process's batches of them."""
    check_writes(model)
    tokenizer = trainer.processing_class
    if isinstance(tokenizer, ProcessorMixin):  # of text and images, which TRL takes by itself
        tokenizer = tokenizer.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    if tokenizer is None:
        raise UserError("general text has to be tokenised; give the Trainer its tokenizer as processing_class")
    processes, process = trainer.accelerator.num_processes, trainer.accelerator.process_index
    texts = texts_of(general if hasattr(general, "__len__") else islice(general, most))
    size = max(1, min(BATCH, trainer.args.per_device_eval_batch_size, len(texts) // (2 * LEAST * processes)))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(trainer.args.seed))
    step = size * processes  # as many in every process
    half = min(max(most // 4, LEAST * step), len(texts) // 2) // step * step
    if half < LEAST * step:
        raise UserError(
            f"general has {len(texts)} texts, and it takes {LEAST} batches of {step} for gradients and {LEAST} for the "
            f"proof; give at least {2 * LEAST * step}"
        )

    def batches(part: Tensor) -> list[Batch]:
        every = text_batches(tokenizer, [texts[index] for index in part], size)
        return every[process::processes]

    slopes, proof = (batches(part) for part in (order[:half], order[half : 2 * half]))
    told = f"{half:,} to say what harms them and {half:,} for its proof"
    return GeneralRows(judge=TextJudge(trainer, model), slopes=slopes, proof=proof, told=told)


def _completions(trainer: Any) -> int:
    """How often a Trainer that is judged by what it generates completes each prompt; 0: it does not."""
    if not callable(getattr(trainer, "_generate_and_score_completions", None)):
        return 0
    completions = getattr(trainer, "num_generations_eval", None) or getattr(trainer, "num_generations", None)
    if not completions:
        raise UserError(
            f"{type(trainer).__name__} generates what it is judged on, and does not say how often for each prompt, so "
            f"a fit cannot ask it; save the adapter and run `pedyra fit FOLDER --data ROWS`"
        )
    return completions


def is_surrogate(trainer: Any) -> bool:
    """Whether the loss that was trained says nothing about held-out rows, and so a divergence is measured."""
    return _completions(trainer) > 0 or getattr(trainer.args, "loss_type", None) == "dft"


def _held_out(trainer: Any, data: Any, what: str) -> tuple[str, Any, Any]:
    """What the held-out rows are called, they, and the rows of training; None for these where they are the same.

    Args:
        what: is judged by them, in words.
    """
    training = trainer.train_dataset
    if data is not None:
        given, name = data if isinstance(data, Mapping) else {"": data}, "data"
        held = {key: part if part is training else _prepared(trainer, part) for key, part in given.items()}
        held = _joined(_unseen(held, training, name, what))
    elif trainer.eval_dataset is not None:
        held, name = _joined(_unseen(trainer.eval_dataset, training, "eval_dataset", what)), "eval_dataset"
    else:
        held, name = None, "train_dataset"
        if training is None:
            raise UserError("the Trainer has no eval_dataset and no train_dataset; give rows as data=")
    if held is None or _is_same(held, training):
        why = "there is no eval_dataset" if held is None else f"{name} is the train_dataset itself"
        warnings.warn(
            f"{why}, so {what} is judged by rows that the adapter was trained on, which it knows better than others; "
            f"give other rows of its task as data=",
            stacklevel=6,
        )
        held, training = training, None
    return name, held, training


def _drawn(trainer: Any, data: Any, most: int) -> tuple[str, Any, list[int], Any, list[int]]:
    """What the held-out rows are called; the rows that calibrate, as a data set and places in it; those held out.

    Args:
        most: that are held out, and that calibrate.
    """
    name, held, training = _held_out(trainer, data, "the fit")
    generator = torch.Generator().manual_seed(trainer.args.seed)
    if training is None:
        every, order = _shuffled(held, 2 * most, generator)
        third = min(most, len(order) // 3)  # one set of rows, of which a third calibrates
        return name, every, order[:third], every, order[third:][:most]
    training, seen = _shuffled(training, most, generator)
    held, left = _shuffled(held, most, generator)
    return name, training, _apart(training, seen, held, left, name), held, left


def _unseen(dataset: Any, training: Any, name: str, what: str) -> Any:
    """Without the train_dataset, where that is one of several data sets by name, as to watch its loss."""
    if not isinstance(dataset, Mapping):
        return dataset
    others = {key: part for key, part in dataset.items() if not _is_same(part, training)}
    if not others or len(others) == len(dataset):
        return dataset
    warnings.warn(
        f"a part of {name} is the train_dataset itself, and {what} is judged by the others: {', '.join(others)}",
        stacklevel=7,
    )
    return others


def _is_same(dataset: Any, training: Any) -> bool:
    """Whether a data set is the train_dataset, or has its rows: TRL's Trainers prepare each data set by itself, the
    same one too."""
    if dataset is training:
        return True
    if isinstance(dataset, IterableDataset) or isinstance(training, IterableDataset):
        return False
    sizes = [len(each) if hasattr(each, "__len__") else 0 for each in (dataset, training)]
    if sizes[0] != sizes[1] or not sizes[0]:
        return False
    places = sorted({*range(0, sizes[0], math.ceil(sizes[0] / SOME)), sizes[0] - 1})
    return all(map(operator.eq, _contents_of(dataset, places), _contents_of(training, places)))


def _apart(training: Any, seen: list[int], held: Any, left: list[int], name: str) -> list[int]:
    """The places of training rows that calibrate, without those that are held out too, as of a part that was selected:
    repair would learn what the proof asks. Where most rows are, as where short texts repeat, all of them stay."""
    proving, contents = set(_contents_of(held, left)), [*_contents_of(training, seen)]
    apart = [place for place, row in zip(seen, contents, strict=True) if row not in proving]
    if both := len(seen) - len(apart):
        done = "so these do not calibrate" if 2 * len(apart) >= len(seen) else "too many to be left out"
        told = f"{both} of {len(seen)} rows of the train_dataset are in {name} too, {done}"
        different = len(proving.intersection(contents))
        trained = min(1.0, different / len(seen) * len(training) / len(left))  # of all training rows as many are
        if trained < LEARNED or different < REPEATED or len(set(contents)) < (1 - LEARNED) * len(seen):
            logger.warning("fit: %s", told)
        else:
            warnings.warn(
                f"{told}. About {trained:.0%} of the held-out rows were trained on, so the adapter knows them better "
                f"than others; hold out rows that it was not trained on",
                stacklevel=6,
            )
    return apart if 2 * len(apart) >= len(seen) else seen


def _contents_of(dataset: Any, places: Sequence[int]) -> Iterator[Hashable]:
    """What each of these rows holds, to be compared."""
    return map(_content, _selected(dataset, list(places)))


def _content(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((str(key), _content(each)) for key, each in sorted(value.items(), key=lambda item: str(item[0])))
    if isinstance(value, list | tuple):
        return tuple(map(_content, value))
    if isinstance(value, Tensor):
        value = (value.float() if value.is_floating_point() else value).numpy(force=True)
    if hasattr(value, "tobytes"):  # an array or an image, which may be large
        return hashlib.sha256(value.tobytes()).digest()
    return value if isinstance(value, Hashable) else object()  # like no other


def _batches(trainer: Any, dataset: Any, size: int, generates: bool) -> list[Batch]:
    """This process's batches of a data set as the Trainer's own evaluation makes them, in the host's memory."""
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
        for batch in trainer.get_eval_dataloader(dataset):  # which has sent it to the device
            batches.append(send_to_device(batch, "cpu") if isinstance(batch, Mapping) else batch)
    finally:
        vars(trainer.args).update(before)
    if odd := [type(batch).__name__ for batch in batches if not isinstance(batch, Mapping) and not generates]:
        raise UserError(
            f"the batches of {type(trainer).__name__} are each a {odd[0]}, and a fit takes dicts of tensors; save the "
            f"adapter and run `pedyra fit FOLDER --data ROWS`"
        )
    if generates:
        # Completions of the whole adapter: it is to say again what it says.
        return [_completed(trainer, batch) for batch in batches]
    if len(batches) != math.ceil(len(dataset) / (size * trainer.accelerator.num_processes)):
        raise UserError(
            f"{type(trainer).__name__}.get_eval_dataloader gives {len(batches)} batches for {len(dataset)} rows in "
            f"batches of {size}, so rows cannot be kept apart; let it take the data "
            f"set that it is given, and the batch size of its arguments"
        )
    return batches


def _completed(trainer: Any, prompts: Any) -> dict[str, Tensor]:
    """A batch of prompts, each with a completion by the model as it is; the labels are the completion's tokens."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with evaluating(model), torch.no_grad():
        found = trainer._prepare_inputs(prompts)
    if images := [key for key in found if "pixel" in key or "image" in key]:
        raise UserError(
            f"the prompts have images ({images[0]}), and a fit of {type(trainer).__name__} is judged by text alone; "
            f"save the adapter and run `pedyra fit FOLDER --data ROWS`"
        )
    on = found["completion_mask"] * found.get("tool_mask", torch.ones_like(found["completion_mask"]))
    labels = found["completion_ids"].masked_fill(on == 0, -100)
    batch = {
        "input_ids": torch.cat([found["prompt_ids"], found["completion_ids"]], 1),
        "attention_mask": torch.cat([found["prompt_mask"], found["completion_mask"]], 1),
        "labels": torch.cat([torch.full_like(found["prompt_ids"], -100), labels], 1),
    }
    return {key: value.cpu() for key, value in batch.items()}


def _prepared(trainer: Any, data: Any) -> Any:
    """Rows as the Trainer takes them. TRL's Trainers tokenise what they are given themselves, unless they are told to
    leave that to the collator; rows that are tokenised already they leave alone."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    eval_packing = getattr(trainer.args, "eval_packing", None)
    known = {
        "dataset": data,
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False) if eval_packing is None else eval_packing,
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "fit",
    }
    takes = () if prepare is None else inspect.signature(prepare).parameters
    skips = getattr(trainer, "_is_vision_dataset", False) or getattr(trainer, "_skip_prepare_dataset", False)
    if prepare is None and callable(getattr(trainer, "tokenize_row", None)):  # ORPO, CPO: when they are made
        first = next(iter(data), {})
        if isinstance(first, Mapping) and not any(str(key).endswith("input_ids") for key in first):
            raise UserError(
                f"{type(trainer).__name__} tokenises its rows when it is made, and data has rows of text; give these "
                f"rows to the Trainer as its eval_dataset, and leave data out"
            )
    if prepare is None or not set(takes) <= known.keys() or skips:
        return data
    if isinstance(data, list):  # of rows, which TRL takes as a data set alone
        from datasets import Dataset

        known["dataset"] = Dataset.from_list(data)
    prepared = prepare(**{name: known[name] for name in takes})
    if getattr(trainer, "precompute_ref_logps", False):  # of DPO's reference, as its own evaluation does
        prepared = trainer._precompute_ref_logps(prepared, "fit", trainer.args.per_device_eval_batch_size)
    return prepared


def _joined(dataset: Any) -> Any:
    """One data set, of several by name."""
    if not isinstance(dataset, Mapping) or not dataset:
        return dataset
    parts = list(dataset.values())
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, IterableDataset) or not hasattr(part, "__len__") for part in parts):
        end = object()  # a row of each in turn, until all have ended
        return (row for each in zip_longest(*parts, fillvalue=end) for row in each if row is not end)
    # Columns of the same name may hold other things in another set; those that the model does not take go later.
    if hasattr(parts[0], "select") and all(getattr(part, "features", None) == parts[0].features for part in parts):
        from datasets import concatenate_datasets

        return concatenate_datasets(parts)
    return torch.utils.data.ConcatDataset(parts)


def _shuffled(dataset: Any, most: int | None, generator: torch.Generator) -> tuple[Any, list[int]]:
    """A data set with a length, and the places of at most so many of its rows, drawn at random; of a stream its first
    rows."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        dataset = list(islice(dataset, most))
    return dataset, torch.randperm(len(dataset), generator=generator)[:most].tolist()


def _selected(dataset: Any, indices: list[int]) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
