"""A model answers the test sets of a recipe's section `generate` in its own words; its texts are scored."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pedyra.app.known_sets import COMPLETE, COMPLETE_STOP, COMPLETED, TEST_SETS
from pedyra.app.recipe_sections import DataSection, GenerateSection, template_columns
from pedyra.app.tasks.causal_lm import messages_of
from pedyra.app.tasks.code import check_all, extract, problems_of
from pedyra.app.tasks.generation import Sample
from pedyra.app.tasks.math import equivalent, gsm8k_reference, last_number, marked_number, math_verify, parse_answer
from pedyra.app.tasks.seq2seq import rouge, rouge_scorer
from pedyra.app.tasks.sources import Rows, read_test_rows, sample
from pedyra.app.tasks.tokens import chat_text, prompt_text, prompt_tokens, tools_of
from pedyra.errors import UserError

TOKENS = 128  # a set that is not known has these max_new_tokens by default
SCORERS = {"rouge": rouge_scorer, "math": math_verify}


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """Prompts, and the references or tests that the answers are scored by."""

    __test__ = False  # pytest, this is no test

    name: str
    prompts: list[list[int]]
    settings: GenerateSection  # no key is left out
    references: list[str]  # the right answers as text; empty for code, whose problems have tests
    problems: list[Any]
    own: bool  # True for the run's held-out rows, whose metrics need no name before them
    ends: list[int]  # tokens that end an answer, beside those that the model and its tokenizer name


def load_test_sets(
    generate: Mapping[str, GenerateSection],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Rows,
    seed: int,
) -> list[TestSet]:
    """Read the test sets of a recipe and make prompts of them. An encoder-decoder has its held-out rows without any."""
    if not generate and data.kind == "seq2seq":
        generate = {"held_out": GenerateSection()}
    own = [name for name in generate if name not in TEST_SETS]
    if len(own) > 1:
        raise UserError(
            f"generate: {' and '.join(own)} both mean the run's held-out rows, which are answered once; keep one of "
            f"them, or name known sets: {', '.join(TEST_SETS)}"
        )
    reader = _TestSetReader(data, tokenizer, held_out, seed)
    return [reader.load(name, section) for name, section in generate.items()]


def check_scorer(score: str | None) -> None:
    """Raise ImportError where the package of a score is not installed."""
    if score in SCORERS:
        SCORERS[score]()


@dataclass(frozen=True)
class _TestSetReader:
    """Makes prompts in the form of the training, by its data section, tokenizer and seed."""

    data: DataSection
    tokenizer: PreTrainedTokenizerBase
    held_out: Rows
    seed: int

    def load(self, name: str, section: GenerateSection) -> TestSet:
        own, defaults = name not in TEST_SETS, dict(TEST_SETS.get(name, {}))
        if own and section.source is not None:
            raise UserError(
                f"generate.{name} has a source, and only known sets have one ({', '.join(TEST_SETS)}); any other name "
                f"means the held-out rows, so give the rows as data.validation, and remove source"
            )
        defaults |= {} if own else self._as_trained(name, defaults)
        settings = self._settings(defaults, section)
        problems: list[Any] = []
        if own:
            if settings.score == "code":
                raise UserError(f"generate.{name} has the score code, and held-out rows have no tests to run")
            rows = sample(self.held_out, settings.rows, self.seed, "validation")
            texts, references = map(list, zip(*map(self._own, rows), strict=True))
        elif defaults["score"] == "code":
            problems = problems_of(self._rows(name, defaults, settings, None), f"generate.{name}")
            template = defaults.get("template")
            if settings.stop is None and not self.data.messages and template is None:
                # A reply to an instruction may well hold a def at the margin.
                settings = settings.model_copy(update={"stop": list(problems[0].stop)})
            questions = [prompt_text({"prompt": problem.prompt}, "prompt", template) for problem in problems]
            texts, references = [self._question(text) for text in questions], []
        else:
            template, reference = defaults["template"], defaults["reference"]
            rows = self._rows(name, defaults, settings, [*template_columns(template), reference])
            texts = [self._question(prompt_text(row, None, template)) for row in rows]
            references = [str(row[reference]) for row in rows]
        for reference in references if settings.score == "gsm8k" else ():
            gsm8k_reference(reference)  # refuses what has no number before any text is generated
        prompts = [self._tokens(text) for text in texts]
        return TestSet(
            name=name, prompts=prompts, settings=settings, references=references, problems=problems, own=own,
            ends=self._ends(),
        )  # fmt: skip

    def _settings(self, defaults: Mapping[str, Any], section: GenerateSection) -> GenerateSection:
        """Fill in every key: from the recipe, else the defaults of the set, else those of the kind of model."""
        usual: dict[str, Any] = {"max_new_tokens": TOKENS, "beams": 1, "score": "exact"}
        if self.data.kind == "seq2seq":
            usual = {"max_new_tokens": self.data.max_target_length, "beams": 4, "score": "rouge"}
        of_set = {key: value for key, value in defaults.items() if key in GenerateSection.model_fields}
        return GenerateSection(**{**usual, **of_set, **section.model_dump(exclude_none=True)})

    def _as_trained(self, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Put the set's question into the template of training, if that has a single place."""
        training_template = self.data.template or ""
        columns = template_columns(training_template)
        if len(columns) != 1:
            return {}
        if name in COMPLETED:
            question, answer_prefix = COMPLETE
            return {"template": _with_place(training_template, question) + answer_prefix, "stop": COMPLETE_STOP}
        question = template_columns(defaults.get("template", "{prompt}"))[0]
        return {"template": _with_place(training_template, "{" + question + "}")}

    def _rows(
        self, name: str, defaults: Mapping[str, Any], settings: GenerateSection, columns: list[str] | None
    ) -> Rows:
        config = defaults.get("config") if settings.source == defaults["source"] else None
        rows = read_test_rows(str(settings.source), config, "test", columns, f"generate.{name}.source")
        return sample(rows, settings.rows, self.seed, f"generate.{name}")

    def _own(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the prompt of a held-out row, and its right answer."""
        data = self.data
        if data.messages:
            messages = messages_of(row, data)
            last = max((turn for turn, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
            if last < 0:
                raise UserError(f"column {data.messages!r} holds {messages!r:.80}, in which no assistant answers")
            prompt = self._chat(messages[:last], row, ask=True)
            # The template may add to the answer (an empty thought, a tool call), as it did in training.
            after = self._chat(messages[: last + 1], row, ask=False).removeprefix(prompt)
            return prompt, self._as_decoded(after)
        return prompt_text(row, data.prompt, data.template), str(row[data.completion or ""])

    def _question(self, text: str) -> str:
        """Write a question as text; after training on chats it is a user's message."""
        if not self.data.messages:
            return text
        return self._chat([{"role": "user", "content": text}], {}, ask=True)

    def _chat(self, messages: list[dict[str, Any]], row: Mapping[str, Any], *, ask: bool) -> str:
        return chat_text(messages, self.tokenizer, self.data.chat_template, ask=ask, tools=tools_of(row))

    def _as_decoded(self, text: str) -> str:
        """Write an answer as a model's is decoded: to the token that ends it, without special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [self.tokenizer.eos_token_id, *self._ends()]
        tokens = ids[: next((place for place, token in enumerate(ids) if token in ends), None)]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _ends(self) -> list[int]:
        """Find the special token that closes an assistant's turn; the config of a base model does not name it."""
        if not self.data.messages:
            return []
        question = [{"role": "user", "content": "0"}]
        try:
            before = self._chat(question, {}, ask=True)
            after = self._chat([*question, {"role": "assistant", "content": "12345"}], {}, ask=False)
        except ValueError:  # a template that takes no such chat
            return []
        ids = self.tokenizer(after.removeprefix(before).partition("12345")[2], add_special_tokens=False)["input_ids"]
        token = self.tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return ids[:1] if token is not None and token.special else []

    def _tokens(self, text: str) -> list[int]:
        most = self.data.max_length
        if self.data.kind == "seq2seq":
            return self.tokenizer(text, truncation=most is not None, max_length=most)["input_ids"]
        if self.data.messages:  # the chat template has written the special tokens
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return prompt_tokens(text, self.tokenizer)


def _with_place(template: str, place: str) -> str:
    """Replace the placeholder of the template by this text; literal braces stay doubled."""
    parts = []
    for text, column, _, _ in string.Formatter().parse(template):
        parts += [text.replace("{", "{{").replace("}", "}}"), "" if column is None else place]
    return "".join(parts)


def score(test_set: TestSet, samples: Sequence[Sample], sandbox: Any = None) -> tuple[dict[str, float], list[str]]:
    """Return metric -> value, and lines about the texts that could not be scored. The main metric of a known set has
    the set's name, and is a fraction."""
    texts, references = [each.text for each in samples], test_set.references
    unfinished, notes = sum(not each.finished for each in samples), []
    if unfinished:
        most = test_set.settings.max_new_tokens
        notes.append(f"{unfinished} of {len(texts)} texts did not end within {most} tokens")
    kind = test_set.settings.score
    if kind == "rouge":
        scores = rouge(texts, references)
        if empty := sum(re.search("[a-z0-9]", right.lower()) is None for right in references):
            notes.append(f"{empty} of {len(references)} references have no letter from a to z: ROUGE reads no others")
    elif kind == "exact":
        same = [text.split() == right.split() for text, right in zip(texts, references, strict=True)]
        scores = {"": sum(same) / len(same)}
    elif kind == "code":
        scores = _code_scores(test_set, texts, sandbox, notes)
    else:
        scores = _math_scores(test_set, texts, notes)
    scores["unfinished"] = float(unfinished)
    prefix = "" if test_set.own else f"{test_set.name}_"
    single = "exact_match" if test_set.own and kind == "exact" else "accuracy" if test_set.own else test_set.name
    return {single if not key else prefix + key: value for key, value in scores.items()}, notes


def _math_scores(test_set: TestSet, texts: Sequence[str], notes: list[str]) -> dict[str, float]:
    """Return the share of right answers, and the number of texts without an answer, which count as wrong. GSM8K is
    scored by the last number of a text, and by the number after "####" (strict match)."""
    answers: list[Any]
    if test_set.settings.score == "gsm8k":
        answers = [last_number(text) for text in texts]
        references = [gsm8k_reference(each) for each in test_set.references]
        strict = [marked_number(text) == number for text, number in zip(texts, references, strict=True)]
        same = [number == each for number, each in zip(answers, references, strict=True)]
        more = {"strict_match": sum(strict) / len(strict)}
    else:
        answers, references = ([parse_answer(text) for text in side] for side in (texts, test_set.references))
        same, more = [equivalent(*sides) for sides in zip(answers, references, strict=True)], {}
    gaps = [row for row, answer in enumerate(answers) if not answer]
    for row in gaps[:3]:
        notes.append(f"no answer was found in the text of row {row + 1}: {texts[row][-120:]!r}")
    return {"": sum(same) / len(same), **more, "unparsable": float(len(gaps))}


def _code_scores(test_set: TestSet, texts: Sequence[str], sandbox: Any, notes: list[str]) -> dict[str, float]:
    """Return pass@1 of one greedy text each, and the number of texts without a program."""
    programs = [extract(text, problem) for text, problem in zip(texts, test_set.problems, strict=True)]
    statuses = check_all(test_set.problems, programs, sandbox)
    notes.append(", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses))))
    return {"": statuses.count("passed") / len(statuses), "unparsable": float(statuses.count("unparsable"))}
