"""The tables of docs/results.md and docs/paper.md that are marked say what the raw rows in docs/results say."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from scipy.stats import binomtest

from pedyra.compare.statistics import bootstrap_interval, standard_error

DOCS = Path(__file__).parents[1] / "docs"
Rows = list[dict[str, Any]]

METHODS = {"adalora, to r": "adalora", "adalora, from r": "adalora from r",
           "pedyra-paper": "pedyra-paper", "random": "random"}  # fmt: skip
FOUND, GIVEN = "pedyra:budget=fit,r=24", "pedyra:budget=fit,r=24,target_rank=4"
"""Rows of planted ranks whose size is found, and given."""
WIDE = {1: 0.032, 2: 0.016, 4: 0.016, 8: 0.008}
"""Rank -> rate of what begins at four times the rank."""


def raw(name: str) -> Rows:
    return [json.loads(line) for line in (DOCS / "results" / f"{name}.jsonl").read_text().splitlines()]


def table(marker: str, page: str = "results") -> list[dict[str, str]]:
    """The rows of the table below `<!-- marker -->`, by column."""
    _, found, below = (DOCS / f"{page}.md").read_text().partition(f"<!-- {marker} -->\n")
    assert found, marker
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in below.split("\n\n")[0].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def difference(better: list[float], digits: int = 4) -> str:
    """Mean and interval of how much better a method is than LoRA, seed by seed."""
    if not any(better):
        return "0 in every run"
    interval = bootstrap_interval(better)
    assert interval is not None
    middle, low, high = (f"{value:+.{digits}f}" for value in (mean(better), *interval))
    return f"{middle} [{low}, {high}]"


def points(better: list[float]) -> str:
    """The same in points of a metric."""
    return difference(better, digits=1)


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {standard_error(values):.1f}"


def short(error: float) -> str:
    return f"{error:.5f}" if error < 0.01 else f"{error:.3f}"


@pytest.mark.parametrize("architecture", ["mlp", "block"])
def test_planted(architecture: str):
    fixed, ours = raw("planted" if architecture == "mlp" else "planted_block"), raw("fit_planted")
    shown = table(f"planted {architecture}")
    assert len(shown) == 10
    for line in shown:
        case = line["profile"], float(line["noise"])
        error = {
            method: {r["seed"]: r["relative_error"] for r in fixed
                     if (r["method"], r["profile"], r["noise"]) == (method, *case)}
            for method in ("lora", "oracle")
        }  # fmt: skip
        for method, errors in error.items():
            assert sorted(errors) == [0, 1, 2, 3, 4]
            assert line[method] == short(mean(errors.values())), line
        for method, column, suffix in ((FOUND, "size found", ""), (GIVEN, "size given", ", given")):
            found = {
                r["seed"]: r for r in ours
                if (r["method"], r["architecture"], r["profile"], r["noise"]) == (method, architecture, *case)
            }  # fmt: skip
            assert sorted(found) == [0, 1, 2, 3, 4]
            assert line[column] == short(mean(r["relative_error"] for r in found.values()))
            worst = max(found[seed]["relative_error"] / error["oracle"][seed] for seed in found)
            assert line[f"at most{suffix}"] == f"{worst:.2f}", line
            exact = sum(r["ranks"] == r["true_ranks"] for r in found.values())
            assert line[f"exact{suffix}"] == f"{exact} of {len(found)}"


def test_planted_in_words():
    exact = [r["ranks"] == r["true_ranks"] for r in raw("fit_planted") if r["method"] == FOUND]
    assert f"holds in {sum(exact)} of {len(exact)} runs" in (DOCS / "results.md").read_text()


Reported = dict[tuple[str, str, str], dict[str, dict[int, dict[str, Any]]]]


@pytest.fixture(scope="module")
def minilm() -> Reported:
    """(task, steps, r) -> method -> seed -> row."""
    found: Reported = defaultdict(lambda: defaultdict(dict))
    for row in raw("minilm"):
        if row["kind"] == "reported":
            case = (row["task"], str(row["steps"]), str(row["budget"]))
            assert row["seed"] not in found[case][row["method"]], row
            found[case][row["method"]][row["seed"]] = row
    return found


def by_case(marker: str, check: Callable[[dict[str, str], tuple[str, str, str]], None], page: str = "results"):
    names = {"SST-2": "sst2", "QNLI": "qnli", "MRPC": "mrpc", "CoLA": "cola"}
    lines = table(marker, page)
    assert len(lines) == 8
    for line in lines:
        task, steps = line["task, steps"].split(", ")
        check(line, (names[task], steps, line["r"]))


def test_minilm_losses(minilm: Reported):
    def check(line: dict[str, str], case: tuple[str, str, str]):
        losses = {name: {seed: row["eval_loss"] for seed, row in rows.items()} for name, rows in minilm[case].items()}
        lora = losses["lora"]
        assert line["lora"] == f"{mean(lora.values()):.4f} ± {standard_error([*lora.values()]):.4f}"
        for shown, method in METHODS.items():
            assert sorted(losses[method]) == sorted(lora) == [0, 1, 2, 3, 4]
            assert line[shown] == difference([lora[seed] - losses[method][seed] for seed in lora]), (case, method)

    by_case("minilm", check)


def test_paper_glue(minilm: Reported):
    def check(line: dict[str, str], case: tuple[str, str, str]):
        metric = "matthews" if case[0] == "cola" else "accuracy"
        found = {name: [100 * rows[seed][metric] for seed in range(5)] for name, rows in minilm[case].items()}
        assert line["LoRA"] == spread(found["lora"])
        for shown, method in (("AdaLoRA", "adalora"), ("PE-DyRA", "pedyra-paper")):
            better = [ours - lora for ours, lora in zip(found[method], found["lora"], strict=True)]
            assert line[f"{shown} less LoRA"] == points(better), (case, method)

    by_case("paper glue", check, "paper")


def test_paper_short():
    rows = [row for row in raw("compare_short") if row["kind"] == "reported"]
    lines = table("paper short", "paper")
    assert len(lines) == 15
    for line in lines:
        for task, shown in (("sst2", "SST-2"), ("reviews", "reviews")):
            lora, ours = (
                [100 * r["value"] for seed in range(3) for r in rows
                 if (r["task"], r["method"], r["seed"]) == (task, method, seed)]
                for method in ("lora", line["method"])
            )  # fmt: skip
            assert line[shown] == spread(ours)
            better = "" if line["method"] == "lora" else points([a - b for a, b in zip(ours, lora, strict=True)])
            assert line[f"{shown} less LoRA"] == better


def test_paper_figures():
    runs = {row["learning_rate"]: row for row in raw("paper_figures")}
    lines = {line["figure"]: line for line in table("paper figures", "paper")}
    assert len(runs) == 3 and len(lines) == 7
    for rate, run in runs.items():
        first, last = (run[f"gradient_norms_{at}"] for at in ("first", "last"))
        found = {
            "3": f"{run['change_importance_correlation']:.2f}",
            "4b": f"{run['rank_importance_correlation']:.2f}",
            "5": f"{run['first_log_variance']:.2f} to {run['last_log_variance']:.2f}",
            "7": f"{run['largest_rank']}",
            "10": f"{run['first_orthogonality']:.2f} to {run['last_orthogonality']:.2f}",
            "11": f"{first[1] / first[0]:.1f} to {last[1] / last[0]:.1f}",
            "1a": f"{run['utilisation']:.2f}",
        }
        assert found == {figure: line[f"rate {rate}"] for figure, line in lines.items()}
        assert 1.07 <= round(run["trainable_parameters"] / 338_690, 2) <= 1.11


def test_paper_table5():
    rows = {row["row"]: row for row in raw("paper_table5")}
    lines = table("paper table5", "paper")
    assert [line["row"] for line in lines] == list(rows)
    for line in lines:
        row = rows[line["row"]]
        assert line["SST-2"] == f"{row['measured']:.1f} ± {row['standard_error']:.1f}"
        assert float(line["published"]) == row["published"]
        if line["row"] != "LoRA":
            assert line["less LoRA"].startswith(f"{row['measured'] - rows['LoRA']['measured']:+.1f} [")
            assert float(line["published less LoRA"]) == pytest.approx(row["published"] - rows["LoRA"]["published"])


def test_paper_code():
    rows = raw("paper_code")
    lines = table("paper code", "paper")
    for line, model in zip(lines, ("before", "lora"), strict=True):
        own = [row for row in rows if row["model"] == model]
        for shown, key in (("HumanEval", "humaneval"), ("HumanEval+", "humanevalplus")):
            passed = sum(row[key] == "passed" for row in own)
            low, high = binomtest(passed, len(own)).proportion_ci(method="wilson")
            assert line[shown] == f"{passed} of {len(own)}: {passed / len(own):.0%} [{low:.0%}, {high:.0%}]"
        assert line["cut off at 200 tokens"] == f"{sum(not row['finished'] for row in own)}"


def test_paper_squad():
    rows = raw("paper_squad")
    nothing = [{**row, "exact": float(not row["answerable"]), "f1": float(not row["answerable"])} for row in rows]
    for line, found in zip(table("paper squad", "paper"), (nothing, rows), strict=True):
        parts = {
            "F1": [row["f1"] for row in found],
            "exact match": [row["exact"] for row in found],
            "HasAns F1": [row["f1"] for row in found if row["answerable"]],
            "NoAns F1": [row["f1"] for row in found if not row["answerable"]],
        }
        for column, values in parts.items():
            reach = 196 * (standard_error(values) or 0)
            assert line[column] == f"{100 * mean(values):.1f} ± {reach:.1f}"


def test_planted_rivals():
    rows = [row for name in ("planted", "planted_tuned") for row in raw(name)]
    rows += [{**row, "method": "pedyra"} for row in raw("fit_planted") if row["method"] == GIVEN]
    lines = table("planted rivals")
    assert len(lines) >= 12
    for line in lines:
        for profile in ("design", "sparse", "linear", "random", "uniform"):
            cells = []
            for rate, noise in zip(line["rates"].split(", "), (0, 0.5), strict=True):
                found = {
                    r["seed"]: r for r in rows
                    if (r["method"], r["lr"], r["profile"], r["noise"]) == (line["method"], float(rate), profile, noise)
                    and r["architecture"] == "mlp"
                }  # fmt: skip
                errors, wrong = zip(
                    *((found[seed]["relative_error"], found[seed]["rank_distance"]) for seed in range(3)), strict=True
                )
                cells.append(f"{short(mean(errors))} ({mean(wrong):.0f})")
            assert line[profile] == ", ".join(cells), (line["method"], profile)


def test_starting_wide():
    letters = {"lora": {1: 0.032, 2: 0.032, 4: 0.032, 8: 0.016}, "moved": {1: 0.048, 2: 0.032, 4: 0.016, 8: 0.016}}
    lines = table("transfer budgets")
    assert [(line["text"], int(line["r"])) for line in lines] == [*(("letters", r) for r in (1, 2, 4, 8)), ("code", 2)]
    for line in lines:
        text, r = line["text"], int(line["r"])
        others, wide = (raw("rot13"), raw("wide_rot13")) if text == "letters" else (raw("transfer"), raw("wide_code"))
        rates = {name: of_rank[r] if text == "letters" else 0.016 for name, of_rank in letters.items()}
        loss = {
            name: {
                row["seed"]: row["loss"] for row in others if (row["method"], row["lr"], row["rank"]) == (name, rate, r)
            }
            for name, rate in rates.items()
        }
        ours = {row["seed"]: row for row in wide if (row["lr"], row["rank"]) == (WIDE[r], r) and row["seed"] < 1000}
        seeds = sorted(ours)
        assert seeds == list(range(5 if text == "letters" else 6))
        limit = int(line["parameters"].replace(",", ""))
        assert {row["parameters"] for row in others if (row["method"], row["rank"]) == ("lora", r)} == {limit}
        assert max(row["parameters"] for row in ours.values()) <= limit
        assert line["lora"] == f"{mean(loss['lora'][seed] for seed in seeds):.4f}"
        assert line["begun at 4 r"] == f"{mean(row['loss'] for row in ours.values()):.4f}"
        for column, name in (("less lora", "lora"), ("less ranks moved", "moved")):
            assert line[column] == difference([loss[name][seed] - ours[seed]["loss"] for seed in seeds]), line


def test_starting_wide_where_the_rank_does_not_bind():
    loss: dict[str, dict[int, float]] = defaultdict(dict)
    for row in raw("wide_sst2"):
        loss[row["method"]][row["seed"]] = row["eval_loss"]
    better = difference([loss["lora"][seed] - loss["wide"][seed] for seed in range(5)])
    told = f"0.4281, LoRA 0.4039: {better} ([rows]"
    assert f"{mean(loss['wide'].values()):.4f}, LoRA {mean(loss['lora'].values()):.4f}" == told[:19]
    assert told in (DOCS / "results.md").read_text()


def test_lora_over_budgets(minilm: Reported):
    rows = [row for row in raw("lora_budgets") if row["kind"] == "reported"]
    losses = {str(r): {row["seed"]: row["eval_loss"] for row in rows if row["budget"] == r} for r in (1, 4, 16, 32)}
    losses |= {r: {seed: row["eval_loss"] for seed, row in minilm["sst2", "300", r]["lora"].items()} for r in "28"}
    lines = table("budgets")
    assert {line["r"] for line in lines} == losses.keys()
    for line in lines:
        loss = losses[line["r"]]
        assert line["loss"] == f"{mean(loss.values()):.4f} ± {standard_error([*loss.values()]):.4f}"
        if line["r"] != "2":
            assert line["worse than r = 2 by"] == difference([loss[seed] - losses["2"][seed] for seed in loss])


def test_gsm8k_in_twice_the_steps():
    loss: dict[str, dict[int, float]] = defaultdict(dict)
    for row in raw("gsm8k_300"):
        loss[row["method"]][row["seed"]] = row["eval_loss"]
    fit = next(row for row in raw("gsm8k_300") if row["method"] == "pedyra")
    share, first = fit["trainable_parameters"] / 610_560, loss["lora"][0]
    told = f"with {share:.0%} of the parameters and {fit['eval_loss']:.4f}, LoRA\n{first:.4f}".replace("%", " %")
    assert told in (DOCS / "results.md").read_text()
    del loss["pedyra"]
    shown = table("gsm8k 300")
    assert {line["method"] for line in shown} == loss.keys()
    for line in shown:
        found = loss[line["method"]]
        better = [loss["lora"][seed] - found[seed] for seed in sorted(found)]
        assert int(line["seeds"]) == len(found)
        assert line["loss"] == f"{mean(found.values()):.4f} ± {standard_error([*found.values()]):.4f}"
        assert line["difference"] == ("" if line["method"] == "lora" else difference(better))


def test_fit_of_sst2():
    methods = ("lora", "fit, 1 %", "fit, 5 %")
    found = {method: {r["seed"]: r for r in raw("fit_sst2") if r["method"] == method} for method in methods}
    for line in table("fit sst2"):
        rows = found[line["method"]]
        losses = [row["eval_loss"] for row in rows.values()]
        assert line["loss"] == f"{mean(losses):.4f} ± {standard_error(losses):.4f}"
        assert line["accuracy"] == f"{mean(row['accuracy'] for row in rows.values()):.3f}"
        if line["method"] != "lora":
            better = [found["lora"][seed]["eval_loss"] - row["eval_loss"] for seed, row in rows.items()]
            assert line["difference"] == difference(better)
            assert line["parameters left"] == ", ".join(f"{row['share']:.0%}" for row in rows.values())


def test_nothing_goes_of_what_is_learned_late(minilm: Reported):
    fit = {row["seed"]: row for row in raw("fit_qnli")}
    lora = minilm["qnli", "300", "8"]["lora"]
    assert sorted(fit) == sorted(lora) and {row["trainable_parameters"] for row in fit.values()} == {338_690}
    apart = max(abs(fit[seed]["eval_loss"] - lora[seed]["eval_loss"]) for seed in fit)
    assert f"to {apart:.4f}, which" in (DOCS / "results.md").read_text()


def test_fit_of_the_demo():
    _, *curve = raw("fit_demo")
    found = {row["parameters"]: row for row in curve}
    lines = table("fit demo")
    assert len(lines) == 7
    for line in lines:
        row = found[int(line["parameters"].replace(",", ""))]
        assert line["share"] == f"{row['share']:.1%}"
        assert line["predicted cost"] == f"{row['predicted_cost']:+.4f}"
        assert line["measured cost"] == f"{row['measured_cost']:+.4f} ± {row['standard_error']:.4f}"
