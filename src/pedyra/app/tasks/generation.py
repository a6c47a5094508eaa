"""A model generates texts in batches, and each batch is saved when it is done.

An interrupted call resumes with the same results, because the batches do not depend on what is done.
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
from rich.progress import track
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from pedyra.app.recipe_sections import GenerateSection
from pedyra.lora.files import append_row, json_line, read_rows, write_file

PLAIN_LINES = 10  # of progress, where stdout is no terminal

WRITING = {"max_new_tokens", "stop", "beams", "batch_size"}  # keys of `GenerateSection` that change what is written


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The text that a model generated for one prompt."""

    row: int  # of the prompt
    text: str  # without the prompt, and up to the stop string
    finished: bool  # False where max_new_tokens ended it
    tokens: int


class SampleFile:
    """The texts of one test set in a run's samples.jsonl, whose key is the hash of weights, prompts and settings. Lines
    of this set with another key are removed; those of another set with this key (HumanEval, HumanEval+) are used."""

    def __init__(self, path: Path, name: str, key_parts: Any) -> None:
        self.path, self.name = path, name
        self._of = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:12]
        shape = {"row": int, "text": str, "finished": bool, "tokens": int}
        rows = read_rows(path, {"set": str, "of": str, **shape})
        useful = [row for row in rows if row["set"] != name or row["of"] == self._of]
        whole = "".join(map(json_line, useful))
        if path.is_file() and path.read_text(encoding="utf-8") != whole:  # also where a line was cut short
            write_file(path, whole)
        self.samples = {
            row["row"]: Sample(**{key: row[key] for key in shape}) for row in useful if row["of"] == self._of
        }

    def add(self, prompt: Any, sample: Sample) -> None:
        append_row(self.path, {"set": self.name, "of": self._of, "prompt": prompt, **asdict(sample)})
        self.samples[sample.row] = sample


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSection,
    file: SampleFile,
    console: Console,
    ends: Sequence[int] = (),
) -> list[Sample]:
    """Generate a text for each prompt, in the prompts' order, or read it from the file; the model is left in evaluation
    mode. `ends` are end tokens beside those of the model and its tokenizer."""
    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # little padding
    size, next_report = settings.batch_size, 0
    batches = [longest_first[start : start + size] for start in range(0, len(prompts), size)]
    with _plain_settings(model):
        for batch in track(batches, file.name, console=console, disable=not console.is_terminal):
            if any(row not in file.samples for row in batch):
                texts = _batch(model, tokenizer, [prompts[row] for row in batch], settings, ends)
                for row, sample in zip(batch, texts, strict=True):
                    if row not in file.samples:
                        prompt = tokenizer.decode(list(prompts[row]), skip_special_tokens=True)
                        file.add(prompt, Sample(row=row, **sample))
            count = sum(row in file.samples for row in longest_first)
            if not console.is_terminal and (count >= next_report or count == len(prompts)):
                console.print(f"{file.name}  {count}/{len(prompts)} texts", soft_wrap=True)
                next_report = count + len(prompts) / PLAIN_LINES
    return [file.samples[row] for row in range(len(prompts))]


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSection,
    also: Sequence[int],
) -> list[dict[str, Any]]:
    """Generate a text for each prompt; return the fields of `Sample` but for the row."""
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    decoder_only = not model.config.is_encoder_decoder  # a text goes on from the last token
    ids = torch.full((len(prompts), longest), 0 if pad is None else int(pad))  # pyright: ignore[reportArgumentType]
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if decoder_only else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    ends = [*_end_tokens(model, tokenizer), *also]
    config: Any = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.beams or 1,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    stops = [_Stops(tokenizer, settings.stop, longest if decoder_only else 1)] if settings.stop else []
    with torch.no_grad():
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
            stopping_criteria=StoppingCriteriaList(stops),
        )  # fmt: skip
    results = []
    # BART's settings end a text that is cut, too.
    forced = getattr(model.generation_config, "forced_eos_token_id", None) is not None
    for prompt, row in zip(prompts, output.tolist(), strict=True):
        new = row[longest:] if decoder_only else row[1:]  # a decoder begins with its start token
        end = next((index for index, token in enumerate(new) if token in ends), None)
        tokens = new[: settings.max_new_tokens if end is None else end]
        text = _decode(tokenizer, list(prompt) if decoder_only else [], tokens)
        stop_at = min((at for stop in settings.stop or () if (at := text.find(stop)) >= 0), default=None)
        by_itself = end is not None and not (forced and len(tokens) + 1 == settings.max_new_tokens)
        finished = by_itself or stop_at is not None
        results.append({"text": text[:stop_at], "finished": finished, "tokens": len(tokens)})
    return results


class _Stops(StoppingCriteria):
    """Ends a text at a stop string, without those that begin in the prompt, of `start` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[str], start: int) -> None:
        self.strings, self.start = StopStringCriteria(tokenizer, stop), start

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.strings(input_ids[:, self.start :], scores, **kwargs)


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """Decode new tokens with their prompt, because some tokenizers drop the first space of a text."""
    plain: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (str(tokenizer.decode(ids, **plain)) for ids in (prompt, [*prompt, *new]))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(new, **plain))  # the prompt ends within a character


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the end tokens of the tokenizer and of the model's generation config (Qwen, Llama 3)."""
    of_model: Any = getattr(model.generation_config, "eos_token_id", None)
    tokens: list[Any] = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(tokens) if token is not None]


# These of a model's own generation settings are part of the architecture.
_STRUCTURAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_STRUCTURAL += ("forced_eos_token_id", "suppress_tokens", "bad_words_ids")


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Remove the model's own sampling, penalties and lengths, which transformers would add."""
    model.eval()
    own: Any = model.generation_config
    model.generation_config = GenerationConfig(**{key: getattr(own, key, None) for key in _STRUCTURAL})
    try:
        yield
    finally:
        model.generation_config = own
