"""The tables of docs/results.md that are marked say what the raw rows in docs/results say."""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import mean, median
from typing import Any

from docs_tables import DOCS, TASKS, bootstrap_interval, difference, minilm, raw, standard_error, table, words

METHODS = {"adalora less LoRA": "adalora", "pedyra-paper less LoRA": "pedyra-paper"}
WIDE = {1: 0.032, 2: 0.016, 4: 0.016, 8: 0.008}
"""Rank -> rate of what begins at four times the rank."""


def test_minilm_losses():
    lines = table("minilm")
    assert len(lines) == 4
    for line in lines:
        task, steps = line["task, steps"].split(", ")
        for r in ("8", "2"):
            runs = minilm()[TASKS[task], steps, r]
            losses = {name: {seed: row["eval_loss"] for seed, row in rows.items()} for name, rows in runs.items()}
            lora = losses["lora"]
            better = {method: [lora[seed] - losses[method][seed] for seed in lora] for method in losses}
            for method in (*METHODS.values(), "adalora from r", "random"):
                assert sorted(losses[method]) == sorted(lora) == [0, 1, 2, 3, 4]
                assert (bootstrap_interval(better[method]) or (0.0, 0.0))[0] <= 0, (task, r, method)
            if r == "8":
                assert line["LoRA"] == f"{mean(lora.values()):.4f} ± {standard_error([*lora.values()]):.4f}"
                assert all(line[shown] == difference(better[method]) for shown, method in METHODS.items()), line


def test_starting_wide():
    letters = {"lora": {1: 0.032, 2: 0.032, 4: 0.032, 8: 0.016}, "moved": {1: 0.048, 2: 0.032, 4: 0.016, 8: 0.016}}
    moved: dict[str, list[list[float]]] = defaultdict(list)
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
        (limit,) = {row["parameters"] for row in others if (row["method"], row["rank"]) == ("lora", r)}
        assert max(row["parameters"] for row in ours.values()) <= limit
        assert line["lora"] == f"{mean(loss['lora'][seed] for seed in seeds):.4f}"
        assert line["begun at 4 r"] == f"{mean(row['loss'] for row in ours.values()):.4f}"
        better = {name: [each[seed] - ours[seed]["loss"] for seed in seeds] for name, each in loss.items()}
        assert line["less lora"] == difference(better["lora"]), line
        moved[text].append(better["moved"])
    letters, (code,) = [mean(each) for each in moved["letters"]], moved["code"]
    assert f"ends {min(letters):.3f} to {max(letters):.3f} above beginning wide" in words("results")
    assert f"it cannot be told ({difference(code)})" in words("results")


def test_no_other_method_beats_lora_on_letters():
    losses = defaultdict(list)
    for row in raw("rot13"):
        if (row["rank"], row["seed"]) == (2, 0):
            losses[row["method"].partition("+")[0] + "+" * ("+" in row["method"])].append(row["loss"])
    lora = min(losses.pop("lora"))
    del losses["moved"]
    assert all(min(each) > lora for each in losses.values())
    assert f"none of {len(losses)} is better than LoRA" in words("results")


def test_starting_wide_where_the_rank_does_not_bind():
    loss: dict[str, dict[int, float]] = defaultdict(dict)
    for row in raw("wide_sst2"):
        loss[row["method"]][row["seed"]] = row["eval_loss"]
    better = difference([loss["lora"][seed] - loss["wide"][seed] for seed in range(5)])
    told = f"0.4281, LoRA 0.4039: {better} ([rows]"
    assert f"{mean(loss['wide'].values()):.4f}, LoRA {mean(loss['lora'].values()):.4f}" == told[:19]
    assert told in words("results")


def test_lora_over_budgets():
    rows = [row for row in raw("lora_budgets") if row["kind"] == "reported"]
    losses = {r: {row["seed"]: row["eval_loss"] for row in rows if row["budget"] == r} for r in (1, 4, 16, 32)}
    for r in (2, 8):
        losses[r] = {seed: row["eval_loss"] for seed, row in minilm()["sst2", "300", str(r)]["lora"].items()}
    *most, last = (f"{mean(losses[r].values()):.4f}" for r in sorted(losses))
    assert f"r = 1, 2, 4, 8, 16 and 32 have a loss of {', '.join(most)} and {last}" in words("results")
    for loss in losses.values():
        low, high = bootstrap_interval([loss[seed] - losses[2][seed] for seed in range(5)]) or (0.0, 0.0)
        assert low <= 0 <= high


def test_gsm8k_in_twice_the_steps():
    loss: dict[str, dict[int, float]] = defaultdict(dict)
    for row in raw("gsm8k_300"):
        loss[row["method"]][row["seed"]] = row["eval_loss"]
    lora = loss["lora"]
    adalora, paper = (
        difference([lora[seed] - loss[m][seed] for seed in range(3)]) for m in ("adalora", "pedyra-paper")
    )
    told = f"LoRA has {mean(lora.values()):.4f}, AdaLoRA is {adalora} and pedyra-paper {paper} of it"
    assert told in words("results")


def test_gsm8k_in_fewer_steps():
    loss: dict[str, list[float]] = defaultdict(list)
    for row in raw("compare_gsm8k"):
        if row["kind"] == "reported":
            loss[row["method"]].append(row["value"])
    assert max(loss.pop("lora")) < min(value for values in loss.values() for value in values)
    assert "At 150 steps LoRA is ahead too" in words("results")


def test_below_one_rank_a_layer():
    first, last = (
        mean(row["eval_loss"] for row in raw("below_one_rank") if (row["kind"], row["method"]) == ("reported", method))
        for method in ("first", "last")
    )
    assert f"the last block is {first - last:.2f} better than the first" in words("results")


def test_fit_of_usual_tasks():
    for line in table("fit tasks"):
        task, steps = line["task, steps"].split(", ")
        lora = minilm()[TASKS[task], steps, "8"]["lora"]
        fit = {row["seed"]: row for row in raw("fit_tasks") if (row["task"], row["method"]) == (TASKS[task], "fit")}
        seeds = sorted(fit)
        assert seeds == {"CoLA": [0, 1], "QNLI": [2, 3, 4]}.get(task, [0, 1, 2, 3, 4])
        losses = [row["eval_loss"] for row in fit.values()]
        assert line["LoRA"] == f"{mean(lora[seed]['eval_loss'] for seed in seeds):.4f}"
        assert line["fit"] == f"{mean(losses):.4f} ± {standard_error(losses):.4f}"
        assert line["less LoRA"] == difference([lora[seed]["eval_loss"] - fit[seed]["eval_loss"] for seed in fit])
        assert line["tolerance"] == f"{mean(row['tolerance'] for row in fit.values()):.4f}"
        assert line["parameters left, %"] == ", ".join(f"{100 * fit[seed]['share']:.0f}" for seed in seeds)


def test_other_methods_at_about_the_size_of_fit():
    found = {
        name: [rows[seed]["eval_loss"] for seed in range(3)] for name, rows in minilm()["sst2", "300", "2"].items()
    }
    for row in raw("fit_tasks"):
        if row["task"] == "sst2" and row["method"] in ("fit", "para") and row["seed"] < 3:
            found.setdefault(row["method"], []).append(row["eval_loss"])
    told = words("results")
    assert all(len(losses) == 3 for losses in found.values())
    for name, shown in (("pedyra-paper", "PE-DyRA"), ("fit", "fit"), ("lora", "LoRA"), ("adalora", "AdaLoRA")):
        assert f"{shown} {mean(found[name]):.4f}" in told
    assert f"PARA (r = 8, cut to r = 2 after training) {mean(found['para']):.4f}" in told
    assert f"the standard error of LoRA alone is {standard_error(found['lora']):.3f}" in told


def test_fit_of_larger_models():
    tasks = ("sst2, MPNet", "gsm8k", "French handbook, SmolLM2", "CodeAlpaca, Qwen2.5-Coder")
    lines = table("fit models")
    assert len(lines) == len(tasks)
    for line, task in zip(lines, tasks, strict=True):
        fit, whole = {}, {}
        for row in [*raw("fit_tasks"), *raw("gsm8k_300")]:
            if row["task"] == task and row["method"] in ("fit", "pedyra"):
                fit[row["seed"]] = row
            elif row["task"] == task and row["method"] in ("lora", "whole"):
                whole[row["seed"]] = row
        seeds = sorted(fit)
        better = [whole[seed]["eval_loss"] - fit[seed]["eval_loss"] for seed in seeds]
        assert line["LoRA"] == f"{mean(whole[seed]['eval_loss'] for seed in seeds):.4f}"
        assert line["fit"] == f"{mean(fit[seed]['eval_loss'] for seed in seeds):.4f}"
        assert line["less LoRA"] == (difference(better) if len(seeds) > 1 else f"{better[0]:+.4f}")
        assert line["tolerance"] == f"{mean(fit[seed]['tolerance'] for seed in seeds):.4f}"
        shares = [fit[seed].get("share", fit[seed]["trainable_parameters"] / 610_560) for seed in seeds]
        assert line["parameters left, %"] == ", ".join(f"{100 * share:.0f}" for share in shares)


def test_an_early_cut_costs_more():
    early = {row["seed"]: row["eval_loss"] for row in raw("fit_tasks") if row["method"] == "fit, from 45 %"}
    lora = minilm()["sst2", "300", "8"]["lora"]
    better = difference([lora[seed]["eval_loss"] - early[seed] for seed in range(5)])
    assert f"ended {better} of LoRA's" in words("results")


def test_what_fit_prints_of_the_demo():
    proof, *curve = raw("fit_demo")
    text = (DOCS.parent / "README.md").read_text()
    shown = re.findall(r"^(->|  ) +([\d,]+) +([\d.]+%) +(\d+) +(\S+) +(\S+ ± \S+)$", text, re.MULTILINE)
    assert len(shown) == 5
    found = {f"{row['parameters']:,}": row for row in curve}
    for arrow, parameters, share, kept, predicted, measured in shown:
        row = found[parameters]
        assert (arrow == "->") == (row["parameters"] == proof["parameters"])
        assert (share, int(kept)) == (f"{row['share']:.1%}", row["kept"])
        assert predicted == f"{row['predicted_cost']:+.4f}"
        assert measured == f"{row['measured_cost']:+.4f} ± {row['standard_error']:.4f}"


def test_fit_of_other_adapters():
    proofs = {row["adapter"]: row for row in raw("fit_adapters") if row["kind"] == "proof"}
    proofs |= {"film reviews": raw("fit_demo")[0]}
    recovered = {row["adapter"]: row for row in raw("fit_recover") if row["kind"] == "proof"}
    lines = table("fit adapters")
    assert [line["adapter"] for line in lines] == list(proofs)

    def cost(row: dict[str, Any]) -> str:
        mean, error = row["measured_cost"], 1.96 * row["standard_error"]
        return f"{mean:+.4f} [{mean - error:+.4f}, {mean + error:+.4f}]"

    for line in lines:
        row, after = proofs[line["adapter"]], recovered.get(line["adapter"])
        assert line["won"] == f"{row['won']:.4f}" and line["tolerance"] == f"{row['tolerance']:.4f}"
        assert (line["left"], line["cost"]) == (f"{row['share']:.1%}", cost(row))
        told = ("not run", "") if after is None else (f"{after['share']:.1%}", cost(after))
        assert (line["left after recovery"], line["its cost"]) == told


def test_what_a_cut_adapter_solves():
    def solved(model: str) -> str:
        rows = [row for row in raw("paper_code") if row["model"] == model and row.get("status") == "passed"]
        first, second, third, last = (
            sum(row["set"] == name for row in rows) for name in ("humaneval", "humanevalplus", "mbpp", "mbppplus")
        )
        return f"{first}, {second}, {third} and {last}"

    told = f"it solves {solved('lora, cut')} of 20 problems, whole {solved('lora')}."
    assert told in words("results")


def test_recovery_after_a_cut():
    told = words("fit")
    for row in raw("fit_recover")[:3]:
        cut, after = row["cut_cost"], row["recovered_cost"]
        if row["kind"] == "held out, labels":
            assert f"with labels lead to {after:.4f} ({row['change']:+.4f} ± {row['standard_error']:.4f})" in told
        elif row["kind"] == "held out":
            assert f"{cut:.4f}, and {after:.4f} after {row['recover_steps']} steps" in told
            assert f"{row['change']:.4f} ± {row['standard_error']:.4f}" in told


def test_predicted_against_measured_cost():
    curves = [*raw("fit_demo")[1:], *(row for row in raw("fit_adapters") if row["kind"] == "size")]
    sizes = [row for row in curves if row["share"] < 1 and row["measured_cost"] is not None]
    clear = [row for row in sizes if row["measured_cost"] > 2 * row["standard_error"]]
    costs = [row["measured_cost"] for row in clear]
    ratios = [row["predicted_cost"] / row["measured_cost"] for row in clear]
    text = words("results")
    assert f"of the {len(sizes)} sizes on the curves of these five adapters, {len(clear)} have" in text
    assert f"from {min(costs):.4f} to {max(costs):.2f}." in text
    assert f"{min(ratios):.2f} to {max(ratios):.2g} times it, {median(ratios):.2f} in the median" in text


def test_cuts():
    rows = raw("cuts")
    for line, share in zip(table("cuts"), (0.5, 0.25, 0.125), strict=True):
        assert line["parameters left"] == f"{100 * share:.3g} %"
        for way in ("fit", "singular values", "energy", "inputs", "random"):
            own = [row for row in rows if row["way"] == way and abs(row["share"] - share) < 0.01]
            costs = [row["cost"] for row in own]
            if way == "random":
                assert len(own) == 3 and line[way] == f"{min(costs):.4f} to {max(costs):.4f}"
            else:
                assert len(own) == 1 and line[way] == f"{costs[0]:.4f} ± {own[0]['standard_error']:.4f}"


def test_graded_ranks():
    found = {(row["way"], round(row["share"], 2)): row for row in raw("graded_cuts")}
    first, by_fit = (
        [found[way, share]["cost"] for share in shares]
        for way, shares in (("first", (0.5, 0.25, 0.12)), ("fit", (0.5, 0.25, 0.12)))
    )
    told = words("results")
    assert "cost {:.4f}, {:.4f} and {:.4f}".format(*first) in told
    assert "loses {:.4f}, {:.4f} and {:.4f}".format(*by_fit) in told
    assert f"Its whole has {found['fit', 0.5]['loss']:.4f}." in told


def test_cuts_of_a_language_model():
    rows, told = raw("cuts_smollm2"), words("results")
    found = {(row["method"], row["way"]): row for row in rows if row["way"] != "random"}

    def cost(method: str, way: str) -> str:
        row = found[method, way]
        return f"{row['cost']:.4f} ± {row['standard_error']:.4f}"

    for way in ("fit", "singular values", "energy", "inputs"):
        assert f"{way} {cost('lora', way)}, " in told
        assert found["lora", way]["cost"] >= found["lora", "fit"]["cost"]
    at_random = [row["cost"] for row in rows if (row["method"], row["way"]) == ("lora", "random")]
    assert f"random {min(at_random):.4f} to {max(at_random):.4f}." in told
    assert f"costs {cost('graded', 'first')}, by fit {cost('graded', 'fit')}" in told
    graded, lora = (found[method, "fit"]["eval_loss"] for method in ("graded", "lora"))
    assert f"its whole has {graded:.4f}, LoRA's {lora:.4f} at that rate" in told


def test_growth():
    rows, told = raw("scale"), words("performance")
    measures = ("overhead_seconds", "measuring_seconds", "adjustment_seconds")
    growth: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "fit" and row["measure"] in measures:
            growth[row["axis"]].append(row["exponent"])
    both = [*growth["layers"], *growth["triples"]]
    assert f"layers and triples by an exponent of {min(both):.2f} to {max(both):.2f}" in told
    assert f"with the rank of at most {max(growth['rank']):.2f}" in told
    assert f"with length and batch of at most {max(*growth['length'], *growth['batch']):.2f}" in told
    (large,) = [row for row in rows if row["kind"] == "adjustment"]
    assert f"{large['adjustment_seconds']:.2f} s for {large['layers']} layers and {large['triples']:,} triples" in told
    (files,) = [row for row in rows if row.get("layers") == 512 and "attach_seconds" in row]
    others = [value for name, value in files.items() if name.endswith("_seconds") and name != "load_seconds"]
    assert f"take {min(others):.2f} to {max(others):.2f} s each, loading {files['load_seconds']:.1f} s" in told
