"""Writes every table of README, docs and research that comes from measurements: python docs/tables.py

A page has `<!-- table: NAME -->` and `<!-- end -->`, and what stands between them is what `TABLES[NAME]` makes of the
rows in research/results. Differences are paired by seed, with a 95 % interval, and positive where the method is better.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import binomtest

from pedyra.export.destinations import destinations
from pedyra.fitting.request import FitRequest
from pedyra.lab.compare.statistics import interval, standard_error
from pedyra.lora.supported import KINDS, VERBS
from pedyra.methods.names import class_of, field_docs
from pedyra.methods.registry import METHODS

DOCS = Path(__file__).parent
RESEARCH = DOCS.parent / "research"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(RESEARCH.glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
Cells = list[list[str]]
"""The first row is the head."""
TABLES: dict[str, Callable[[], Cells]] = {}


def table(name: str) -> Callable[[Callable[[], Cells]], Callable[[], Cells]]:
    def known(make: Callable[[], Cells]) -> Callable[[], Cells]:
        TABLES[name] = make
        return make

    return known


def written(page: Path) -> str:
    """The text of a page with every table made anew.

    Raises:
        KeyError: a marker names a table that is not there.
    """
    return MARKED.sub(lambda found: found[1] + _markdown(TABLES[found[2]]()) + found[3], page.read_text())


def _markdown(cells: Cells) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]]) + "\n"


# Rows, and numbers as the tables show them.


@cache
def rows(name: str) -> list[Row]:
    """The rows of research/results/NAME.jsonl."""
    return [json.loads(line) for line in (RESEARCH / "results" / f"{name}.jsonl").read_text().splitlines()]


def where(found: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def by_seed(found: Iterable[Row], value: str) -> dict[int, float]:
    result: dict[int, float] = {}
    for row in found:
        assert row["seed"] not in result, f"two rows of one seed: {row}"
        result[row["seed"]] = row[value]
    return result


def gain(lora: Mapping[Any, float], ours: Mapping[Any, float], digits: int = 4) -> str:
    """How much lower our losses are, seed by seed: mean and interval."""
    assert lora.keys() == ours.keys(), (lora, ours)
    return difference([lora[seed] - ours[seed] for seed in ours], digits)


def difference(values: Sequence[float], digits: int = 4) -> str:
    if not any(values):
        return "0 in every run"
    return f"{mean(values):+.{digits}f} {ends(*_interval(values), digits)}"


def ends(low: float, high: float, digits: int = 4) -> str:
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    found = interval(values)
    assert found is not None, "an interval takes two seeds"
    return found


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Mean and standard error."""
    values = [*values]
    return f"{mean(values):.{digits}f} ± {standard_error(values) or 0:.{digits}f}"


def short(error: float) -> str:
    return f"{error:.5f}" if error < 0.01 else f"{error:.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


# Results: where ranks go, and what it gains.

PROFILES = ("design", "sparse", "linear", "random", "uniform")


@table("destinations")
def places() -> Cells:
    """Where a LoRA is served, from the rows by which `pedyra export` and a fit write for it."""
    cells = [["destination", "ranks", "mixed ranks", "target", "seen with"]]
    for place in destinations().values():
        ranks = ", ".join(map(str, place.ranks)) or (
            f"{place.least} to {place.most}" if place.most else "any" if place.least == 1 else f"{place.least} and more"
        )
        seen = "not run" if place.seen is None else place.seen.partition(",")[0]
        cells.append([f"`{place.name}`", ranks, "yes" if place.mixed else "no", f"`{place.form}`", seen])
    return cells


@table("kinds")
def kinds() -> Cells:
    """What each verb takes; why not, and what to do, its message says to whoever asks for more."""
    taken = ([kind.name, kind.sign, *("no" if verb in kind.refused else "yes" for verb in VERBS)] for kind in KINDS)
    return [["kind of LoRA", "in LoraConfig", *VERBS], *taken]


@table("planted")
def planted() -> Cells:
    every = [*rows("planted"), *rows("planted_block")]
    cells = [["network", "profile", "LoRA", "oracle"]]
    for network in ("mlp", "block"):
        for profile in PROFILES:
            of = {m: where(every, architecture=network, profile=profile, method=m) for m in ("lora", "oracle")}
            errors = [short(mean(by_seed(where(of[m], noise=0.5), "relative_error").values())) for m in of]
            cells.append([network, profile, *errors])
    return cells


FORMS = {
    "pedyra": "`PeDyra()`",
    "pedyra:start=svd": '`PeDyra(start="svd")`',
    "pedyra:start=svd,orth_weight=0.1,min_rank=1": "`PeDyra.as_published()`",
}


@table("planted forms")
def planted_forms() -> Cells:
    """The mean error over seeds and the ranks in a wrong layer, beside those of LoRA and of the true ranks."""
    known = [*rows("planted"), *rows("planted_block")]
    cells = [["network", "profile", *FORMS.values(), "LoRA", "true ranks"]]
    for network, names in (("mlp", [*FORMS]), ("block", [*FORMS][:2])):
        for profile in PROFILES:
            case = {"architecture": network, "profile": profile, "lr": 0.005, "noise": 0.0}
            line = []
            for name in FORMS:
                tried = where(rows("planted_forms"), method=name, **case) if name in names else []
                error, wrong = (
                    mean(row[key] for row in tried or [{key: 0}]) for key in ("relative_error", "rank_distance")
                )
                line.append(f"{error:.4f} ({wrong:.0f} of 48)" if tried else "")
            others = [
                mean(row["relative_error"] for row in where(known, method=name, **case)) for name in ("lora", "oracle")
            ]
            cells.append([network, profile, *line, *(f"{error:.4f}" for error in others)])
    return cells


@table("planted family")
def planted_family() -> Cells:
    cells = [["method", "with 0.1", "switched off"]]
    for method in ("adalora-svd", "elalora"):
        tried = [where(rows("planted_forms"), method=name) for name in (method, f"{method}:orth_weight=0")]
        cells.append([f"`{method}`", *(f"{mean(row['relative_error'] for row in each):.3f}" for each in tried)])
    return cells


@table("energy")
def energy() -> Cells:
    """Uniform ranks beside those by the energy of a trained LoRA, and those of PE-DyRA, all at r = 2."""
    names = {"qnli": "QNLI", "mrpc": "MRPC", "facts": "phone book", "language": "Norwegian", "gsm8k": "GSM8K"}
    titles = {(task, None): title for task, title in names.items()}
    titles |= {("rot13", 5.5e-3): "rot13", ("rot13", 1e-2): "rot13, at 1e-2"}
    cells = [["task", "seeds", "uniform ranks", "ranks by energy", "lower by", "`PeDyra()`", "lower by"]]
    for (task, rate), title in titles.items():
        case = where(rows("energy"), task=task, **({"learning_rate": rate} if rate else {}))
        losses = {
            method: by_seed(where(case, method=method), "eval_loss") for method in ("lora", "by energy", "pedyra")
        }
        uniform = losses.pop("lora")
        others = [cell for each in losses.values() for cell in (spread(each.values()), gain(uniform, each))]
        cells.append([title, str(len(uniform)), spread(uniform.values()), *others])
    return cells


@table("norms")
def norms() -> Cells:
    """How much lower the loss is than LoRA's with squares of the inputs in Eq. (6), and with their root."""
    titles = [("facts", 5e-3, "phone book"), ("language", 5.5e-3, "Norwegian"), ("rot13", 5.5e-3, "rot13, at 5.5e-3")]
    titles += [("rot13", 1e-2, "rot13, at 1e-2"), ("sst2", 3e-4, "SST-2, r = 8"), ("qnli", 3e-4, "QNLI, r = 8")]
    cells = [["task", "`PeDyra()`", '`PeDyra(input_norm="rms")`']]
    for task, rate, title in titles:
        known = where([*rows("energy"), *rows("usual")], task=task, learning_rate=rate)
        lora, squares = (by_seed(where(known, method=name), "eval_loss") for name in ("lora", "pedyra"))
        root = by_seed(where(rows("norms"), task=task, learning_rate=rate), "eval_loss")
        cells.append([title, gain(lora, squares), _of_seeds(lora, root)])
    return cells


FORMS_OF_USE = ("pedyra", "from zero", "from zero, no moves")
"""`PeDyra()` at LoRA's rate, and the paper's start without Eq. (2) at a rate of its own, with moves and without."""


@table("forms")
def forms() -> Cells:
    """How much lower the loss of each form is than LoRA's, each at its own rate."""
    heads = ["`PeDyra()`", "from E = 0, without Eq. (2)", "the same without moves", "as published"]
    cells = [["task, steps", "r", "LoRA", *heads]]
    for task, steps, r in _usual():
        found = _minilm(task, steps, r, "eval_loss")
        case = where(rows("usual"), task=TASKS[task], steps=steps, budget=r)
        ours = {name: by_seed(where(case, method=name), "eval_loss") for name in FORMS_OF_USE}
        if not ours["pedyra"]:
            continue
        if not ours["from zero, no moves"]:  # an earlier run of the same
            earlier = where(rows("minilm"), kind="reported", task=TASKS[task], steps=steps, budget=r)
            ours["from zero, no moves"] = by_seed(where(earlier, method="from zero"), "eval_loss")
        lora = by_seed(where(case, method="lora"), "eval_loss") or found["lora"]  # beside them, or before
        shown = [_of_seeds(lora, each) for each in (*ours.values(), found["pedyra"])]
        cells.append([f"{task}, {steps}", str(r), spread(lora.values()), *shown])
    return cells


def _of_seeds(lora: Mapping[int, float], ours: Mapping[int, float]) -> str:
    """How much lower ours are, and the number of seeds where some were not run."""
    if not ours:
        return ""
    few = "" if len(ours) == len(lora) else f" ({len(ours)} seeds)"
    return gain({seed: lora[seed] for seed in ours}, ours) + few


@table("controls")
def controls() -> Cells:
    """As many moves at random, from LoRA's start."""
    heads = ["`PeDyra()`, lower than LoRA by", "`RandomMoves()`, lower than LoRA by", "`PeDyra()`, lower than that by"]
    cells = [["task", *heads]]
    for task in ("SST-2", "QNLI"):
        case = where(rows("usual"), task=TASKS[task], steps=300, budget=8)
        lora, ours, random = (by_seed(where(case, method=name), "eval_loss") for name in ("lora", "pedyra", "random"))
        cells.append([task, gain(lora, ours), gain(lora, random), gain(random, ours)])
    return cells


@table("other methods")
def other_methods() -> Cells:
    """Planted ranks of the design without noise, and other letters at r = 2; each at its best rate."""
    letters: dict[str, Row] = {}
    of_letters = [*rows("letters_methods"), *rows("rot13")]
    for row in sorted(where(of_letters, rank=2, seed=0), key=lambda row: -row["loss"]):
        letters["lora+" if row["method"].startswith("lora+") else row["method"].partition(":")[0]] = row
    lines = []
    for method in [*METHODS, "rslora"]:
        found = _best_planted(method)
        error = short(mean(row["relative_error"] for row in found)) if found else ""
        wrong = f"{mean(row['rank_distance'] for row in found):.0f}" if found else ""
        rate = f"{found[0]['lr']:g}" if found else ""
        loss, size, lr = "", "", ""
        if method in letters:
            row = letters[method]
            loss, size, lr = f"{row['loss']:.4f}", f"{row['parameters']:,}", f"{row['lr']:g}"
        if error or loss:
            lines.append((float(error or 9), float(loss or 9), [method, error, wrong, rate, loss, lr, size]))
    head = ["method", "planted: error", "ranks in a wrong layer", "rate", "toy letters: loss", "rate", "parameters"]
    return [head, *(cells for _, _, cells in sorted(lines))]


def _best_planted(method: str) -> list[Row]:
    """The three seeds of the rate that is best on seed 0, of those with three; none where the method was not run."""
    tried = where(rows("planted_methods"), method=method)
    whole = [row for row in tried if row["seed"] == 0 and len(where(tried, lr=row["lr"])) == 3]
    if not whole:
        return []
    return where(tried, lr=min(whole, key=lambda row: row["relative_error"])["lr"])


# Results: usual tasks.

TEXTS = {"language": "Norwegian", "letters": "rot13", "facts": "facts", "gsm8k": "GSM8K", "code": "code"}
TASKS = {"SST-2": "sst2", "QNLI": "qnli", "MRPC": "mrpc", "CoLA": "cola"}


def _minilm(task: str, steps: int, r: int, value: str) -> dict[str, dict[int, float]]:
    """Method -> seed -> value."""
    case = where(rows("minilm"), kind="reported", task=TASKS[task], steps=steps, budget=r)
    return {m: by_seed(where(case, method=m), value) for m in ("lora", "adalora", "adalora from r", "pedyra")}


def _usual() -> Iterable[tuple[str, int, int]]:
    """Task, steps and r."""
    for task in TASKS:
        steps = 300 if task in ("SST-2", "QNLI") else 900
        yield from ((task, steps, r) for r in (2, 8))


@table("usual tasks")
def usual_tasks() -> Cells:
    heads = ["AdaLoRA, 1.5 times as large", "AdaLoRA of LoRA's size", "PE-DyRA as published"]
    cells = [["task, steps", "r", "LoRA", *heads]]
    for task, steps, r in _usual():
        found = _minilm(task, steps, r, "eval_loss")
        lora = found.pop("lora")
        cells.append(
            [f"{task}, {steps}", str(r), spread(lora.values()), *(gain(lora, ours) for ours in found.values())]
        )
    return cells


@table("gsm8k")
def gsm8k() -> Cells:
    cells = [["steps", "LoRA", "AdaLoRA, 1.5 times as large", "PE-DyRA as published", "`PeDyra()`"]]
    for steps, name, value in ((150, "compare_gsm8k", "value"), (300, "gsm8k_300", "eval_loss")):
        reported = where(rows(name), kind="reported")
        lora, *others = (by_seed(where(reported, method=m), value) for m in ("lora", "adalora", "pedyra"))
        others.append(by_seed(where(rows("usual"), task="gsm8k", steps=steps, method="pedyra"), "eval_loss"))
        shown = [gain(lora, ours) if ours else "" for ours in others]
        cells.append([str(steps), f"{mean(lora.values()):.4f}", *shown])
    return cells


@table("rank curve")
def rank_curve() -> Cells:
    reported = where(rows("lora_budgets"), kind="reported")
    losses = {r: by_seed(where(reported, budget=r), "eval_loss") for r in (1, 4, 16, 32)}
    losses |= {r: _minilm("SST-2", 300, r, "eval_loss")["lora"] for r in (2, 8)}
    head = ["r", *(str(r) for r in sorted(losses))]
    loss = ["loss", *(f"{mean(losses[r].values()):.4f}" for r in sorted(losses))]
    better = ["lower than at r = 2 by", *("" if r == 2 else gain(losses[2], losses[r]) for r in sorted(losses))]
    return [head, loss, better]


NAMED = {"lora": "LoRA", "adalora": "AdaLoRA", "pedyra": "PE-DyRA", "pissa": "PiSSA", "eva": "EVA"}


@table("language")
def language() -> Cells:
    """Text that a real decoder hardly knows, each method at its best rate."""
    every = rows("language")
    heads = ["text", "r", "method", "rates", "loss at the best"]
    cells = [[*heads, "lower than LoRA's of its size by", "lower than LoRA's, r = 1, by"]]
    cases = dict.fromkeys((row["task"], row["budget"], row["method"]) for row in every)
    for task, r, method in sorted(cases, key=lambda case: (list(TEXTS).index(case[0]), case[1])):
        found = where(every, task=task)
        tried = where(found, kind="tuning", method=method, budget=r)
        ours, same, narrow = (
            by_seed(where(found, kind="reported", method=of, budget=size), "eval_loss")
            for of, size in ((method, r), ("lora", r), ("lora", 1))
        )
        best = min(tried, key=lambda row: row["eval_loss"])["learning_rate"]
        rates = sorted(row["learning_rate"] for row in tried)
        told = ", ".join(f"**{rate:g}**" if rate == best else f"{rate:g}" for rate in rates)
        reported = [f"not run; tuning {min(row['eval_loss'] for row in tried):.3f}", "", ""]
        if ours:
            reported = [spread(ours.values()), "" if method == "lora" else gain(same, ours)]
            reported.append(gain(narrow, ours) if r > 1 else "")
        cells.append([TEXTS[task], str(r), NAMED.get(method, method), told, *reported])
    return cells


@table("longer")
def longer() -> Cells:
    """Norwegian at r = 1 with more steps, and with another model."""
    every, rates = rows("language_more"), (0.001, 0.0017, 0.003, 0.0055, 0.01)
    heads = [*(f"rate {rate:g}" for rate in rates), "seeds", "loss at the best", "lower than LoRA's by"]
    cells = [["model", "steps", "method", *heads]]
    for model, steps, method in dict.fromkeys((row["model"], row["steps"], row["method"]) for row in every):
        found = where(every, model=model, steps=steps)
        tuned = {row["learning_rate"]: row["eval_loss"] for row in where(found, kind="tuning", method=method)}
        ours, same = (by_seed(where(found, kind="reported", method=of), "eval_loss") for of in (method, "lora"))
        told = [f"{tuned[rate]:.3f}" if rate in tuned else "" for rate in rates]
        loss, less = spread(ours.values()), ""
        if len(ours) == 1:  # which has no spread
            loss, less = f"{ours[0]:.4f}", f"{same[0] - ours[0]:+.4f}" if method != "lora" else ""
        elif method != "lora":
            less = gain(same, ours)
        cells.append([model, str(steps), NAMED.get(method, method), *told, str(len(ours)), loss, less])
    return cells


@table("language curve")
def language_curve() -> Cells:
    """LoRA's curve over the rank on Norwegian, in float32."""
    reported = where(rows("language_float32"), kind="reported", task="language")
    losses = {r: by_seed(where(reported, budget=r), "eval_loss") for r in (2, 4, 8, 16)}
    loss = ["loss", *(spread(losses[r].values()) for r in losses)]
    lower = ["lower than at half of it by", *("" if r == 2 else gain(losses[r // 2], losses[r]) for r in losses)]
    return [["r", *map(str, losses)], loss, lower]


# Results: fit.


FORGETTING = {
    "whole": "the whole adapter",
    "scaled": "the whole adapter, times {asked:g}",
    "intruders": "{asked:.0%} of its intruders left",
    "fit": "`pedyra fit --general --tolerance {asked:.0%}`",
}


@table("forgetting")
def forgetting() -> Cells:
    """What a fit for general text undoes, and simpler ways at no more loss of the task, in pairs by run."""
    head = ["way", "left", "rise of the task's loss", "rise of the general loss"]
    cells = [[*head, "less than scaled by", "less than by intruders by"]]
    every = [row for row in rows("forgetting") if row["way"] != "base"]
    runs = {run: where(every, run=run) for run in dict.fromkeys(row["run"] for row in every)}
    base = {row["run"]: row["general_loss"] for row in where(rows("forgetting"), way="base")}
    for way, asked in dict.fromkeys((row["way"], row["asked"]) for row in every):
        of = where(every, way=way, asked=asked)
        whole = {run: where(found, way="whole")[0]["loss"] for run, found in runs.items()}
        losses = [row["loss"] - whole[row["run"]] for row in of]
        general = [row["general_loss"] - base[row["run"]] for row in of]
        rivals = ("scaled", "intruders") if way == "fit" else ()
        ahead = [difference([_at_most(runs[row["run"]], rival, row) for row in of]) for rival in rivals]
        cells.append([
            FORGETTING[way].format(asked=asked),
            percent(mean(row["amount"] for row in of)) if way == "fit" else "",
            *(f"{mean(each):+.4f} ± {standard_error(each):.4f}" for each in (losses, general)),
            *(ahead or ["", ""]),
        ])  # fmt: skip
    return cells


def _at_most(run: list[Row], rival: str, row: Row) -> float:
    """Return by how much a row's general loss is below the lowest that a rival has at no more loss of the task: of what
    was measured of it, and on straight lines between."""
    line = sorted((each for each in run if each["way"] in ("whole", rival)), key=lambda each: -each["asked"])
    found = [each["general_loss"] for each in line if each["loss"] <= row["loss"]]
    for above, below in pairwise(line):
        low, high = sorted((above, below), key=lambda each: each["loss"])
        if low["loss"] <= row["loss"] < high["loss"]:
            part = (row["loss"] - low["loss"]) / (high["loss"] - low["loss"])
            found.append(low["general_loss"] + part * (high["general_loss"] - low["general_loss"]))
    return min(found) - row["general_loss"]


METRICS = ("accuracy", "perplexity")
METRICS_OF = ("base", "whole", "smaller")


@table("fits")
def fits() -> Cells:
    """What a fit keeps of each classifier that was trained to the end, at three tolerances."""
    return _fits("trained")


@table("short fits")
def short_fits() -> Cells:
    """What a fit at its defaults keeps of classifiers that were trained for a few hundred steps."""
    return _fits("short")


@table("decoder fits")
def decoder_fits() -> Cells:
    """What a fit at its defaults keeps of a language model's adapter."""
    return _fits("decoder")


def _fits(kind: str) -> Cells:
    """What each fit keeps, what that does to the metric, and what it takes."""
    kept = ("adapter", "tolerance", "metric", "base", "whole", "smaller", "rank", "loss increase", "may cost")
    cells = [[*kept, "steps of training", "steps of the fit", "rows for ±0.5 points"]]
    for row in where(rows("fit"), kind=kind):
        metric = next(name for name in METRICS if name in row["metrics"]["whole"])
        values = [row["metrics"].get(which, row["metrics"]["whole"])[metric] for which in METRICS_OF]
        shown = [f"{100 * each:.1f} %" if metric == "accuracy" else f"{each:.3f}" for each in values]
        enough = ""
        if "accuracy_interval" in row:
            low, high = (100 * each for each in row["accuracy_interval"])
            shown[-1] += f", {100 * row['accuracy_change']:+.1f} {ends(low, high, 1)}"
            enough = f"{round(8 * row['batches'] * (high - low) ** 2, -2):,.0f}"  # the error falls as 1 / sqrt(rows)
        told = "kept whole" if row["interval"] is None else f"{row['measured_increase']:+.4f} {ends(*row['interval'])}"
        rank = f"{row['rank']} of {row['of_rank']}"
        took = [f"{row['training_steps']:,} of {row['training_rows']} rows", f"{row['steps']:.0f} of 8 rows"]
        allowed = "1 point" if row["asked"] == "1pt" else f"{row['tolerance']:.4f}"
        cells.append([row["adapter"], row["asked"], metric, *shown, rank, told, allowed, *took, enough])
    return cells


@table("adapters")
def adapters() -> Cells:
    """The classifiers that were trained to the end: ranks at two tolerances, and accuracy; those that got smallest
    first."""
    head = ["adapter", "base", "whole", "rank at 1 % of the loss", "rank at 1 point", "accuracy at 1 point"]
    cells = [[*head, "steps of the fit"]]
    every = where(rows("fit"), kind="trained")
    smallest = sorted(where(every, asked="1pt"), key=lambda row: row["rank"] / row["of_rank"])
    for adapter in dict.fromkeys(row["adapter"] for row in smallest):
        strict, points = (where(every, adapter=adapter, asked=asked)[0] for asked in ("1%", "1pt"))
        accuracy = {which: found["accuracy"] for which, found in points["metrics"].items()}
        base, whole, smaller = (f"{100 * accuracy.get(which, accuracy['whole']):.1f} %" for which in METRICS_OF)
        if "accuracy_interval" in points:
            low, high = (100 * each for each in points["accuracy_interval"])
            smaller += f", {100 * points['accuracy_change']:+.1f} {ends(low, high, 1)}"
        ranks = [f"{row['rank']} of {row['of_rank']}" for row in (strict, points)]
        cells.append([adapter, base, whole, *ranks, smaller, f"{points['steps']:.0f}"])
    return cells


@table("adapters in short")
def adapters_in_short() -> Cells:
    """The columns of README."""
    head, *every = adapters()
    return [["adapter", "accuracy", head[4], "accuracy then"], *([row[0], row[2], row[4], row[5]] for row in every)]


@table("an epoch")
def an_epoch() -> Cells:
    """What each rank costs of the adapter that was trained for an epoch, and the part of what was won that this is."""
    (fitted,) = where(rows("fit"), adapter="SST-2", asked="1%")
    cells = [["rank", "loss increase", "of what was won"]]
    for row in rows("fit_epoch")[1:]:
        rise, error = row["measured_increase"], row["standard_error"]
        cells.append([str(row["rank"]), f"{rise:+.4f} ± {error:.4f}", percent(rise / fitted["won"])])
    return cells


@table("fresh")
def fresh() -> Cells:
    """How often a fit on fresh rows took a size that is beyond the tolerance."""
    cells = [["adapter", "fits", "beyond, as measured", "clearly beyond", "intervals that hold", "ranks taken"]]
    every = rows("fresh")
    for run in dict.fromkeys(row["run"] for row in every):
        of = where(every, run=run)
        counts = [sum(row[key] for row in of) for key in ("beyond_as_measured", "beyond", "covered")]
        taken = sorted(row["rank"] for row in of)
        ranks = ", ".join(f"{rank} ({taken.count(rank)})" for rank in dict.fromkeys(taken))
        beyond, clearly = (f"{count} {_exact(count, len(of))}" for count in counts[:2])
        cells.append([run, str(len(of)), beyond, clearly, str(counts[2]), ranks])
    return cells


def _exact(count: int, every: int) -> str:
    """The exact interval (Clopper and Pearson) of a share, in percent."""
    low, high = binomtest(count, every).proportion_ci(method="exact")
    return f"[{low:.0%}, {high:.0%}]"


@table("answers")
def answers() -> Cells:
    """Ranks of one fit of each number of rows, asked without labels and with them, and what is true on other rows."""
    cells = [["adapter", "rows", *(f"{each} of the answers" for each in SHARES), "1 point", "1 % of the loss"]]
    cases = where(rows("answers"), fit=0)
    for run, count in dict.fromkeys((row["run"], row["rows"]) for row in cases):
        case = {row["asked"]: row for row in where(cases, run=run, rows=count)}
        line = [f"{run}, {percent(next(iter(case.values()))['accuracy'])}", f"{count:,}"]
        for share in SHARES:
            row = case[f"changed {share}"]
            line.append(f"{row['rank']} of {row['of']}" + _truth(row))
        for asked in ("tolerance 1pt", "tolerance 1%"):
            row = case.get(asked)
            line.append(f"{row['rank']} of {row['of']}" + _truth(row) if row else "")
        cells.append(line)
    return cells


SHARES = ("5%", "2%", "1%")


def _truth(row: Row) -> str:
    """What a smaller size truly changes."""
    if row["share"] == 1:
        return ""
    return f": {percent(row['true_changed'])} changed, {-100 * row['true_fall']:+.1f} points"


@table("fresh answers")
def fresh_answers() -> Cells:
    """How often a fit without labels took a size that truly changes more of the answers than it was asked for."""
    cells = [["asked", "fits", "smaller", "truly more than asked", "ranks taken"]]
    for share in SHARES:
        fits = [row for row in rows("answers") if row["asked"] == f"changed {share}" and row["rows"] == 1000]
        fits = [row for row in fits if row["run"] == "SST-2"]
        beyond = sum(row["beyond"] for row in fits)
        bound = binomtest(beyond, len(fits)).proportion_ci(method="exact")
        ranks = sorted(row["rank"] for row in fits)
        counts = ", ".join(f"{rank} ({ranks.count(rank)})" for rank in dict.fromkeys(ranks))
        smaller = str(sum(row["share"] < 1 for row in fits))
        cells.append([share, str(len(fits)), smaller, f"{beyond} [{bound.low:.0%}, {bound.high:.0%}]", counts])
    return cells


@table("forward")
def forward() -> Cells:
    """A forward pass in PEFT by rank, beside the base model's."""
    cells = [["model", *(f"rank {row['rank']}" for row in where(rows("forward"), model="minilm"))]]
    for model, title in (("minilm", "MiniLM, 32 texts"), ("llama-512x8", "a Llama of width 512, 8 blocks")):
        times = [
            f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}], {row['megabytes']:.3g} MB"
            for row in where(rows("forward"), model=model)
        ]
        cells.append([title, *times])
    return cells


@table("starts")
def starts() -> Cells:
    """A LoRA of one rank, cut from a larger one or trained at it: how much its loss is above the larger one's."""
    every = rows("starts")
    adapters = [*dict.fromkeys(row["adapter"] for row in every)]
    cells = [["way", *adapters]]
    for way, rate in dict.fromkeys((row["way"], row.get("learning_rate")) for row in every):
        told = [way if rate is None else f"{way}, at a rate of {rate:g}"]
        for adapter in adapters:
            found = where(every, adapter=adapter, way=way, learning_rate=rate)
            told += [f"{row['increase']:+.4f} ± {row['standard_error']:.4f}" for row in found] or [""]
        cells.append(told)
    return cells


@table("ways")
def ways() -> Cells:
    """By how much the loss rises with what a fit takes at a rank, and with each of the ways that it chooses among."""
    others = ("calibrated", "singular values, repaired", "singular values")
    cells = [["adapter", "rank", "fit", "takes", *others]]
    every = rows("ways")
    for adapter, rank in dict.fromkeys((row["adapter"], row["rank"]) for row in every):
        case = {row["way"]: row for row in where(every, adapter=adapter, rank=rank)}
        rises = {way: f"{row['increase']:+.4f} ± {row['standard_error']:.4f}" for way, row in case.items()}
        more = case["fit"]["parameters"] / case["calibrated"]["parameters"] - 1
        taken = case["fit"]["taken"] + (f", and {100 * more:.1f} % more in some layers" if more else "")
        line = [f"{adapter}, {case['fit']['classes']} classes", str(rank), rises["fit"], taken]
        cells.append([*line, *(rises[way] for way in others)])
    return cells


@table("alphas")
def alphas() -> Cells:
    """The loss of both at LoRA's rate, at three alphas."""
    cells = [["alpha / r", "LoRA", "`PeDyra()`", "lower by"]]
    for alpha in (8, 16, 40):
        lora, ours = (
            by_seed(where(rows("alphas"), alpha=alpha, method=method), "eval_loss") for method in ("lora", "pedyra")
        )
        cells.append([str(alpha // 8), spread(lora.values()), spread(ours.values()), gain(lora, ours)])
    return cells


@table("decoders")
def decoders() -> Cells:
    """Ranks of one fit of each language model, by the share of next tokens that may change."""
    cells = [["adapter", "rows", *(f"{share} of the next tokens" for share in SHARES), "1 % of the loss"]]
    for run in dict.fromkeys(row["run"] for row in rows("decoders")):
        case = {row["asked"]: row for row in where(rows("decoders"), run=run)}
        line = [run, str(next(iter(case.values()))["rows"])]
        for asked in (*(f"changed {share}" for share in SHARES), "tolerance 1%"):
            row = case.get(asked)
            shown = f"{row['rank']} of {row['of']}" if row else ""
            if row and "changed" in row:
                shown += f": {percent(row['changed'])}, at most {percent(row['changed_at_most'])}"
            line.append(shown)
        cells.append(line)
    return cells


# The paper.


@table("glue")
def glue() -> Cells:
    published = {"SST-2": "+0.80", "QNLI": "+0.63", "MRPC": "+1.48", "CoLA": "+2.10"}
    heads = ["AdaLoRA less LoRA", "PE-DyRA less LoRA", "published", "`PeDyra()` less LoRA"]
    cells = [["task, steps", "r", "LoRA", *heads]]
    for task, steps, r in _usual():
        metric = "matthews" if task == "CoLA" else "accuracy"
        found = _minilm(task, steps, r, metric)
        points = {m: {seed: 100 * value for seed, value in each.items()} for m, each in found.items()}
        lora = points["lora"]
        others = [gain(points[m], lora, digits=1) for m in ("adalora", "pedyra")]  # a metric: higher is better
        case = where(rows("usual"), task=TASKS[task], steps=steps, budget=r, method="pedyra")
        now = {seed: 100 * value for seed, value in by_seed(case, metric).items()}
        line = [f"{task}, {steps}", str(r), spread(lora.values(), 1), *others, published[task] if r == 8 else ""]
        base = by_seed(where(rows("usual"), task=TASKS[task], steps=steps, budget=r, method="lora"), metric)
        base = {seed: 100 * value for seed, value in base.items()} or lora
        cells.append([*line, gain(now, {seed: base[seed] for seed in now}, 1) if now else ""])
    for task, steps in (("SST-2", 300), ("MRPC", 900)):
        found = where(rows("ten_seeds"), task=TASKS[task])
        lora, ours = (
            {seed: 100 * value for seed, value in by_seed(where(found, method=m), "accuracy").items()}
            for m in ("lora", "pedyra")
        )
        shown = [f"{task}, {steps}, ten seeds", "8", spread(lora.values(), 1), "", gain(ours, lora, 1)]
        cells.append([*shown, published[task], ""])
    return cells


@table("methods on GLUE")
def methods_on_glue() -> Cells:
    """Rows of Tables 2, 5, 11 and 14 and of Figure 4a, each against the one that the paper compares it with."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    tasks = ("SST-2", "MRPC", "CoLA")
    for row in rows("paper_glue"):
        place, task, name = row["id"].replace("table", "").replace("figure", "Fig. "), row["column"], row["row"]
        if place == "14":  # its columns are k
            task, name = name.removesuffix(" (Acc.)"), task
        found.setdefault((place, name.replace("importance", "PE-DyRA")), {})[task] = row
    cells = [["table", "row", "compared with", *(text for task in tasks for text in (task, "published"))]]
    lora = found["2", "LoRA"]
    levels = [(spread(lora[task]["values"].values(), 1), str(lora[task]["published"])) for task in tasks]
    cells.append(["2", "LoRA", "", *(text for level in levels for text in level)])
    against = {"11": "PiSSA", "14": "k=12", "Fig. 4a": "PE-DyRA"}
    for (place, name), own in found.items():
        other = against.get(place, "LoRA")
        if name == other:
            continue
        line = [place, name, other]
        for task in tasks:
            if task not in own:
                line += ["", ""]
                continue
            row, base = own[task], found[place, other][task]
            line.append(gain(row["values"], base["values"], 1))
            line.append("" if row["published"] is None else f"{row['published'] - base['published']:+.2f}")
        cells.append(line)
    return cells


@table("PeDyra on GLUE")
def pedyra_on_glue() -> Cells:
    """The rows of PE-DyRA of the table before in the form that a user takes, each against the same one of the paper."""
    every = rows("compare_paper")
    against = {
        ("2", "PE-DyRA"): ("pedyra", "lora"),
        ("5", "+Prune"): ("prune", "lora"),
        ("5", "+Expand"): ("expand", "lora"),
        ("11", "PE-DyRA+PiSSA"): ("pedyra on pissa", "pissa"),
        ("14", "k=4"): ("k=4", "k=12"),
        ("14", "k=24"): ("k=24", "k=12"),
        ("Fig. 4a", "random shuffle"): ("random", "pedyra"),
    }
    titles = {"lora": "LoRA", "pissa": "PiSSA", "pedyra": "PE-DyRA"}
    cells = [["table", "row", "compared with", "SST-2"]]
    for (place, name), (method, other) in against.items():
        points = [{row["seed"]: 100 * row["accuracy"] for row in where(every, method=each)} for each in (method, other)]
        cells.append([place, name, titles.get(other, other), gain(*points, digits=1)])
    return cells


@table("table 13")
def rank_budgets() -> Cells:
    """PE-DyRA less LoRA at the ranks of Table 13; rank 8 is that of `methods on GLUE`."""
    found = {(*row["row"].split(", "), row["column"]): row for row in rows("paper_table13")}
    for row in where(rows("paper_glue"), id="table2"):
        if row["row"] in ("LoRA", "PE-DyRA"):
            found[row["column"], row["row"], "rank=8"] = row
    cells = [["task", "r", "LoRA", "PE-DyRA less LoRA", "published"]]
    for task, rank in sorted(
        {(task, int(column.removeprefix("rank="))) for task, _, column in found if task in ("MRPC", "CoLA")},
        key=lambda each: (each[0] == "CoLA", each[1]),
    ):
        lora, ours = (found[task, name, f"rank={rank}"] for name in ("LoRA", "PE-DyRA"))
        published = f"{ours['published'] - lora['published']:+.2f}"
        shown = spread(lora["values"].values(), 1)
        cells.append([task, str(rank), shown, gain(ours["values"], lora["values"], 1), published])
    return cells


@table("table 10")
def time_and_memory() -> Cells:
    """Table 10; published numbers are of DeBERTa-v3-base on a GPU."""
    found = rows("paper_table10")
    columns = list(dict.fromkeys(row["column"] for row in found))
    cells = [["task", "method", *(text for column in columns for text in (column, "published"))]]
    for name in dict.fromkeys(row["row"] for row in found):
        line = name.split(", ")
        for column in columns:
            (row,) = where(found, row=name, column=column)
            error = row["standard_error"]
            line += [f"{row['measured']:.4g}" + (f" ± {error:.2g}" if error else ""), f"{row['published']:g}"]
        cells.append(line)
    return cells


@table("code")
def code() -> Cells:
    models = {
        "before": "as it came", "lora": "LoRA", "lora, cut": "LoRA, cut to 37 % by fit", "dora": "DoRA",
        "pedyra, dora": "PE-DyRA on DoRA", "qlora": "QLoRA", "pedyra-paper, 4 bits": "PE-DyRA on QLoRA",
        "rasa": "RaSA", "adalora": "AdaLoRA", "no input score": "PE-DyRA, no input score", "pedyra-paper": "PE-DyRA",
    }  # fmt: skip
    sets = {"HumanEval": "humaneval", "HumanEval+": "humanevalplus", "MBPP": "mbpp", "MBPP+": "mbppplus"}
    cells = [["model", *sets, "perplexity"]]
    for model, shown in models.items():
        own = where(rows("paper_code"), model=model)
        told = []
        for name in sets.values():
            told += [_counted(row["passed"], row["problems"]) for row in where(own, set=name)] or [""]
        (perplexity,) = (row["value"] for row in own if row["set"] == "perplexity")
        cells.append([shown, *told, f"{perplexity:.3f}"])
    return cells


def _counted(solved: int, problems: int) -> str:
    """How many were solved, and Wilson's 95 % interval of how many."""
    low, high = binomtest(solved, problems).proportion_ci(method="wilson")
    return f"{solved} [{problems * low:.0f}, {problems * high:.0f}]"


@table("mathematics")
def mathematics() -> Cells:
    sets = {"GSM8K": "gsm8k", "MATH": "math"}
    cells = [["model", *sets, "perplexity"]]
    names = {
        "lora": "LoRA",
        "dora": "DoRA",
        "qlora": "QLoRA",
        "rasa": "RaSA",
        "adalora": "AdaLoRA",
        "pedyra": "PE-DyRA",
    }
    for model in dict.fromkeys(row["model"] for row in rows("paper_gsm8k")):
        shown, own = names[model], where(rows("paper_gsm8k"), model=model)
        counts = [where(own, set=name)[0] for name in sets.values()]
        told = [f"{_counted(row['passed'], row['problems'])} of {row['problems']}" for row in counts]
        (perplexity,) = (row["value"] for row in own if row["set"] == "perplexity")
        cells.append([shown, *told, f"{perplexity:.3f}"])
    return cells


@table("squad")
def squad() -> Cells:
    """The numbers of SQuAD's official script, in per cent."""
    found = rows("paper_squad")
    cells = [["method", "rate", "loss", "F1", "exact match", "F1 where there is an answer", "F1 where there is none"]]
    for row in found:
        scores = [f"{row[key]:.1f}" for key in ("f1", "exact", "HasAns_f1", "NoAns_f1")]
        cells.append([{"lora": "LoRA", "pedyra": "PE-DyRA"}[row["method"]], f"{row['learning_rate']:g}"])
        cells[-1] += [f"{row['loss']:.3f}", *scores]
    silent = f"{100 * found[0]['NoAns_total'] / found[0]['total']:.1f}"
    return [*cells, ["a model that answers nothing", "", "", silent, silent, "0.0", "100.0"]]


FIGURES: dict[str, tuple[str, str]] = {
    "1a": (
        "Pruning alone has few effective ranks, expansion alone a low utilisation, both together neither.",
        "does not hold: pruning alone has the most of both, with the ends that are read here",
    ),
    "1b": (
        "With the input score layers change places less.",
        "each at its best rate: {stability: with input, without input}; both at 0.003: "
        "{stability: with input, without input at 0.003}",
    ),
    "3": ("Important layers gain ranks.", "holds"),
    "4b": ("The mean rank of a layer goes with its mean importance.", "holds, by Algorithm 2"),
    "5": (
        "The variance of G^(2/3) / r falls, and ends below that of LoRA's triples.",
        "it falls: holds; it ends below: {last log variance: PE-DyRA, LoRA (SVD triples)}",
    ),
    "7": (
        "PE-DyRA's ranks are more concentrated than AdaLoRA's.",
        "{Gini coefficient of the ranks: PE-DyRA, AdaLoRA}",
    ),
    "8": (
        "Masked ranks come back less often with gradient-aware weights.",
        "{share of masked triples that come back: gradient-aware, linear combination}; the weights hardly differ in a "
        "model so small",
    ),
    "9": (
        "These weights make the loss fall faster and more steadily.",
        "{mean training loss: with weighting, without weighting}; {roughness: with weighting, without weighting}",
    ),
    "10": ("The orthogonality term falls and stays low.", "holds"),
    "11": (
        "Gradients of A and B are smaller than those of E by orders of magnitude.",
        "cannot tell what is meant: by their norms A's and B's are smaller by a third and by a half; by the mean size "
        "of an entry by at least 30 and 47 times, for A and B have 384 entries or more for each one of E",
    ),
}
"""Figure -> what the paper says of it, and the verdict, in which {column: row, other row} is their difference."""
HIGHER_IS_CLAIMED = ("stability", "Gini coefficient of the ranks")


@table("rates")
def rates() -> Cells:
    """MRPC at r = 8: both methods at PE-DyRA's published rate, LoRA at another one, and each at its own best."""
    every = rows("compare_rates")
    found = {
        name: [by_seed(where(every, method=name), value) for value in ("accuracy", "eval_loss")]
        for name in ("lora 3e-4", "lora 1e-3", "pedyra 1e-3")
    }
    best = {m: [_minilm("MRPC", 900, 8, value)[m] for value in ("accuracy", "eval_loss")] for m in ("lora", "pedyra")}
    pairs = {
        ("1e-3", "1e-3, as published"): (found["lora 1e-3"], found["pedyra 1e-3"]),
        ("3e-4", "1e-3"): (found["lora 3e-4"], found["pedyra 1e-3"]),
        ("3e-4", "3e-3, the best of each"): (best["lora"], best["pedyra"]),
    }
    cells = [["LoRA's rate", "PE-DyRA's rate", "seeds", "LoRA", "PE-DyRA", "PE-DyRA less LoRA", "lower loss"]]
    for used, (lora, ours) in pairs.items():
        points = [{seed: 100 * value for seed, value in each[0].items()} for each in (lora, ours)]
        shown = [*(spread(each.values(), 1) for each in points), gain(points[1], points[0], 1)]  # higher is better
        cells.append([*used, str(len(points[0])), *shown, gain(lora[1], ours[1])])
    return cells


@table("figures")
def figures() -> Cells:
    cells = [["figure", "the paper says", "measured", "verdict"]]
    for figure, (says, verdict) in FIGURES.items():
        own = where(rows("paper_figures"), id=f"figure{figure}")
        cells.append([figure, says, _told(own), _verdict(own, verdict)])
    return cells


@table("undone")
def undone() -> Cells:
    """How many of the pruned triples the adjustment before had added, and how many of all that were added stayed."""
    heads = ["run", "triples at the start", "moves", "steps between", "seeds", "pruned", "of which just added"]
    cells = [[*heads, "added ones at the end"]]
    kinds = ("task", "method", "triples", "moves", "interval")
    every = rows("undone")
    for kind in dict.fromkeys(tuple(row[key] for key in kinds) for row in every):
        own = where(every, **dict(zip(kinds, kind, strict=True)))
        pruned, back, stayed = (sum(row[key] for row in own) for key in ("pruned", "undone", "stayed"))
        added = sum(row.get("added", row["pruned"]) for row in own)  # by parameters more may come than go
        task, method, *sizes = kind
        on = ", on PiSSA" if method.endswith("on PiSSA") else ""
        name = f"{task}{on}{', `PeDyra()`' if method.startswith('PeDyra()') else ''}"
        shown = [*map(str, sizes), str(len(own)), str(pruned), f"{back / pruned:.0%}", f"{stayed / added:.0%}"]
        cells.append([name, *shown])
    return cells


def _verdict(own: list[Row], text: str) -> str:
    return re.sub(r"\{(.+?): (.+?), (.+?)\}", lambda found: _judged(own, *found.groups()), text)


def _judged(own: list[Row], column: str, row: str, other: str) -> str:
    ours, theirs = (where(own, column=column, row=name)[0]["values"] for name in (row, other))
    values = [ours[seed] - theirs[seed] for seed in ours]
    low, high = _interval(values)
    sign = 1 if column in HIGHER_IS_CLAIMED else -1
    verdict = "cannot tell" if low <= 0 <= high else "holds" if sign * low > 0 else "does not hold"
    return f"{verdict}: {mean(values):+.3g} [{low:+.3g}, {high:+.3g}]"


def _told(own: list[Row]) -> str:
    columns: dict[str, list[str]] = {}
    for row in own:
        alone = sum(other["column"] == row["column"] for other in own) == 1
        name = "" if alone and row["row"] == "PE-DyRA" else f"{row['row']} "
        columns.setdefault(row["column"], []).append(f"{name}{row['measured']:.3g} ± {row['standard_error']:.1g}")
    return "; ".join(f"{column}: {', '.join(values)}" for column, values in columns.items())


# What the package has.


LINES = {
    "lora": "`LoraConfig()`",
    "pissa": '`LoraConfig(init_lora_weights="pissa")`',
    "dora": "`LoraConfig(use_dora=True)`",
    "qlora": "`LoraConfig()` on a model in 4 bits",
    "randlora": "`RandLoraConfig()`",
    "adalora": "`AdaLora()` on an `AdaLoraConfig`",
}
"""Name -> what stands in Python for it, where it is no class of its own."""
SIZES = {
    **dict.fromkeys(("adalora-svd", "prune"), "fall"),
    **dict.fromkeys(("sora", "dylora"), "are cut at the end"),
    **dict.fromkeys(("increlora", "triadaptlora", "expand"), "grow"),
    **dict.fromkeys(("pedyra", "random", "elalora"), "move"),
    **dict.fromkeys(("adalora", "mask"), "are masked"),
    **dict.fromkeys(("eva", "gora", "autolora"), "are chosen first"),
}
"""Name -> what ranks do; the parameters that are trained follow, but for those that are masked."""


@table("methods")
def methods() -> Cells:
    cells = [["in a recipe", "what it is", "in Python", "ranks", "a step", "resume", "DDP", "`torch.compile`"]]
    steps = {row["variant"]: (row["ratio_to_lora"], *row["ratio_quartiles"]) for row in rows("step_methods")}
    for name, method in METHODS.items():
        kind = class_of(name)
        line = LINES.get(name) or f"`{kind.__name__}()`"
        compiles = "" if not method.moves_ranks or name == "adalora" else "yes" if kind().compiles else "no"
        resumes = "yes" if method.resumable else "no"
        step = "{:.2f} ({:.2f} to {:.2f})".format(*steps[name]) if name in steps else ""
        ddp = "" if name in LINES else "yes" if kind().in_processes else "no"
        cells.append([f"`{name}`", method.summary, line, SIZES.get(name, "stay"), step, resumes, ddp, compiles])
    return cells


@table("demo")
def demo() -> Cells:
    """What `make demo` says of its two trainings."""
    every = {row["method"]: row for row in rows("demo")}
    named = {
        "accuracy": (".3f", "accuracy"),
        "eval_loss": (".3f", "held-out loss"),
        "parameters": (",", "trained parameters"),
    }
    lines = [
        [name, *(f"{every[method][key]:{form}}" for method in ("pedyra", "lora"))]
        for key, (form, name) in named.items()
    ]
    return [["", "PE-DyRA", "LoRA"], *lines]


@table("methods in short")
def methods_in_short() -> Cells:
    """For README: the line, the paper, and what ranks do; without the paper's ablations and PEFT's own configs."""
    _, *every = methods()
    ablations = ("`prune`", "`expand`", "`random`", "`mask`")
    shown = (cells for cells in reversed(every) if cells[0] not in ablations and cells[0].strip("`") not in LINES)
    return [["in Python", "method", "its ranks"], *([row[2], row[1].partition(":")[0], row[3]] for row in shown)]


@table("FitRequest")
def asked_of_a_fit() -> Cells:
    """The fields of `FitRequest`, each as the option that the command line makes of it."""
    head, *rest = _settings(FitRequest)
    options = [f"`--{cells[0].strip('`').replace('_', '-')}`" for cells in rest]
    return [
        ["Python, recipe", "command line", *head[1:]],
        *([cells[0], option, *cells[1:]] for cells, option in zip(rest, options, strict=True)),
    ]


def _settings(kind: Any) -> Cells:
    """The fields of a config, with the docstring below each."""
    told = field_docs(kind)
    cells = [["field", "default", "meaning"]]
    for field in fields(kind):
        default = "required" if field.default is MISSING else f"`{field.default!r}`"
        cells.append([f"`{field.name}`", default, told[field.name].replace("|", "\\|")])
    return cells


# Performance.


@table("step")
def step() -> Cells:
    cells = [["model", "variant", "a run", "observed", "idle", "by the floor", "memory", "an adjustment, s"]]
    for row in rows("step"):
        lora = where(rows("step"), model=row["model"], compile=row["compile"], variant="lora")[0]
        kinds = row.get("ratio_by_kind", {})
        told = [row["ratio_to_lora"], kinds.get("observed"), kinds.get("idle"), row["ratio_to_floor"]]
        told.append(row["peak_bytes"] / lora["peak_bytes"])
        seconds = row["adjustment_seconds"]
        shown = ["" if value is None else f"{value:.3f}" for value in (*told, seconds)]
        cells.append([row["model"] + ", compiled" * row["compile"], row["variant"], *shown])
    return cells


@table("growth")
def growth() -> Cells:
    measures = {
        "overhead_seconds": "observing a step (PE-DyRA)",
        "measuring_seconds": "Gramians of a step (fit)",
        "adjustment_seconds": "an adjustment",
        "state_bytes": "memory of the scores",
    }
    axes = ("layers", "triples", "rank", "length", "batch")
    cells = [["what grows", *axes]]
    for measure, shown in measures.items():
        of = {row["axis"]: row["exponent"] for row in where(rows("scale"), kind="fit", measure=measure)}
        cells.append([shown, *(f"{round(of[axis], 2) + 0.0:.2f}" for axis in axes)])
    return cells


@table("operations")
def operations() -> Cells:
    (found,) = where(rows("scale"), kind="operations")
    names = ("attach", "adjustment", "checkpoint", "resume", "save", "load", "export")
    return [
        [f"{found['layers']} layers", *names],
        ["seconds", *(f"{found[f'{name}_seconds']:.2f}" for name in names)],
    ]


UNABLE = ", which cannot follow a rank change"
"""Every message of a refused optimizer has these words, and the page says them once."""


def _works_with(kind: str) -> Cells:
    """A line for all that behave the same, those first in which ranks move."""
    head = {"trainer": "Trainer", "optimizer": "optimizer", "engine": "engine"}[kind]
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(where(rows("works_with"), kind=kind), key=lambda row: row["ranks"] != "move"):
        cells = ((row[each] or "-").replace(UNABLE, "") for each in ("ranks", "resume", "fit"))
        alike.setdefault((*cells,), []).append(row["name"])
    return [
        [head, "ranks", "a resume gives", "`pedyra.fit` afterwards"],
        *(["; ".join(names), *cells] for cells, names in alike.items()),
    ]


@table("works with tool")
def works_with_tools() -> Cells:
    """A package's version stands beside what was run with it."""
    cells = [["tool", "version", "run with it"]]
    for row in sorted(where(rows("works_with"), kind="tool"), key=lambda row: row["run"].startswith("not")):
        others = [version for name, version in row["versions"].items() if name not in ("torch", "transformers")]
        cells.append([row["name"], *(others or [""]), row["run"]])
    return cells


for _kind in ("trainer", "optimizer", "engine"):
    table(f"works with {_kind}")(partial(_works_with, _kind))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page))
