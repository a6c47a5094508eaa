"""Texts that a model writes after prompts: batched, stopped, counted, and kept in a file as they are done.

A killed call goes on where it stopped, and gives what it would have given: batches are the same whatever is finished
already, and each draws with a seed of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pedyra.app.generate_section import GenerateSection
from pedyra.lora.files import append_row, json_line, read_rows, write_file

PLAIN_LINES = 10  # lines of progress where stdout is no terminal

WRITING = {"max_new_tokens", "stop", "beams", "samples", "temperature", "top_p", "batch_size"}
"""Keys of `GenerateSection` that change what is written after given tokens."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text of one prompt; a line of samples.jsonl, beside the name of its set and what it was made of."""

    row: int
    """Index of the prompt."""
    sample: int
    """0 to samples - 1."""
    text: str
    """Without the prompt, the stop string and what comes after."""
    finished: bool
    """Whether it ended by itself; False: it was cut after max_new_tokens."""
    tokens: int


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSection,
    *,
    name: str,
    seed: int,
    file: Path,
    made_by: str,
    console: Console,
) -> list[list[Sample]]:
    """`settings.samples` texts of each prompt, in the prompts' order; the model is left in evaluation mode.

    Args:
        prompts: token ids. For an encoder-decoder they are the source, for a decoder what the text goes on from.
        name: of the set, in the file and on the progress bar.
        file: samples.jsonl; lines of this set that were made of other prompts, settings or weights are dropped. Those
            of another set with the same ones serve for both (HumanEval and HumanEval+).
        made_by: tells the weights apart, for instance their hash.
    """
    described = [
        settings.model_dump(mode="json", include=WRITING), seed, made_by, [list(map(int, ids)) for ids in prompts]
    ]  # fmt: skip
    of = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]
    done = {(sample.row, sample.sample): sample for sample in _kept(file, name, of)}
    wanted = [(row, sample) for row in range(len(prompts)) for sample in range(settings.samples)]
    wanted.sort(key=lambda item: -len(prompts[item[0]]))  # equal lengths together: little padding
    batches = [wanted[start : start + settings.batch_size] for start in range(0, len(wanted), settings.batch_size)]
    with _progress(console, name, len(wanted), len(done)) as advance, _plain_settings(model):
        for number, batch in enumerate(batches):
            missing = [item for item in batch if item not in done]
            if not missing:
                continue
            texts = _batch(model, tokenizer, [prompts[row] for row, _ in batch], settings, seed + 1_000_003 * number)
            for (row, sample), (text, finished, tokens) in zip(batch, texts, strict=True):
                if (row, sample) in done:
                    continue
                found = Sample(row=row, sample=sample, text=text, finished=finished, tokens=tokens)
                prompt = tokenizer.decode(list(prompts[row]), skip_special_tokens=True)
                append_row(file, {"set": name, "of": of, "prompt": prompt, **asdict(found)})
                done[row, sample] = found
            advance(len(missing))
    return [[done[row, sample] for sample in range(settings.samples)] for row in range(len(prompts))]


def _kept(file: Path, name: str, of: str) -> list[Sample]:
    """The finished samples in the file, which is left without what is of no use to this set any more."""
    sample = {"row": int, "sample": int, "text": str, "finished": bool, "tokens": int}
    rows = read_rows(file, {"set": str, "of": str, **sample})
    useful = [row for row in rows if row["set"] != name or row["of"] == of]
    whole = "".join(map(json_line, useful))
    if file.is_file() and file.read_text(encoding="utf-8") != whole:  # also where a line was cut short
        write_file(file, whole)
    fields = Sample.__dataclass_fields__
    return [Sample(**{key: row[key] for key in fields}) for row in useful if row["of"] == of]


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSection,
    seed: int,
) -> list[tuple[str, bool, int]]:
    """Text, whether it ended by itself, and its number of tokens, for each prompt."""
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    left = not model.config.is_encoder_decoder  # a text goes on from the last token
    ids = torch.full((len(prompts), longest), 0 if pad is None else int(pad))  # pyright: ignore[reportArgumentType]
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    ends = _end_tokens(model, tokenizer)
    config: Any = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.beams or 1,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or None,
        top_p=settings.top_p if settings.temperature else None,
        stop_strings=settings.stop or None,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    with torch.no_grad(), torch.random.fork_rng(devices=_gpus(model)):
        torch.manual_seed(seed)
        made: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
            tokenizer=tokenizer,
        )  # fmt: skip
    results = []
    for prompt, row in zip(prompts, made.tolist(), strict=True):
        new = row[longest:] if left else row[1:]  # a decoder begins with its start token
        end = next((index for index, token in enumerate(new) if token in ends), None)
        kept = new[: settings.max_new_tokens if end is None else end]
        text = _decode(tokenizer, list(prompt) if left else [], kept)
        cut = min((at for stop in settings.stop or () if (at := text.find(stop)) >= 0), default=None)
        results.append((text if cut is None else text[:cut], end is not None or cut is not None, len(kept)))
    return results


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens after a prompt; decoded with it, as some tokenizers drop a text's first space."""
    plain: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(ids, **plain) for ids in (prompt, [*prompt, *new]))
    assert isinstance(before, str) and isinstance(whole, str)
    if whole.startswith(before):
        return whole[len(before) :]
    alone = tokenizer.decode(new, **plain)  # the prompt ends within a character
    assert isinstance(alone, str)
    return alone


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's authors name (Qwen, Llama 3)."""
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    own: Any = tokenizer.eos_token_id
    named = named if isinstance(named, list) else [named]
    return [int(token) for token in dict.fromkeys([*named, own]) if token is not None]


# What of a model's own generation settings is no matter of taste.
_STRUCTURAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_STRUCTURAL = (*_STRUCTURAL, "forced_eos_token_id", "suppress_tokens", "bad_words_ids")


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Without the sampling, penalties and lengths of the authors' settings, which transformers would fill in."""
    model.eval()
    own: Any = model.generation_config
    model.generation_config = GenerationConfig(**{key: getattr(own, key, None) for key in _STRUCTURAL})
    try:
        yield
    finally:
        model.generation_config = own


def _gpus(model: PreTrainedModel) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []


@contextmanager
def _progress(console: Console, name: str, total: int, done: int) -> Iterator[Any]:
    """A bar on a terminal, a line now and then elsewhere; gives what is called with the number of new texts."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    bar = Progress(
        *columns, TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(name, total=total, completed=done)
    seen: dict[str, float] = {"done": done, "next": done}

    def advance(count: int) -> None:
        seen["done"] += count
        bar.update(task, completed=seen["done"])
        if not console.is_terminal and (seen["done"] >= seen["next"] or seen["done"] == total):
            console.print(f"{name}  {seen['done']:.0f}/{total} texts", soft_wrap=True)
            seen["next"] = seen["done"] + total / PLAIN_LINES

    with bar:
        yield advance
