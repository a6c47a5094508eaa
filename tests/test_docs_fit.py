"""What docs/results.md, docs/fit.md and README.md say of fit is what the raw rows in docs/results say."""

from __future__ import annotations

import re
from statistics import mean, median
from typing import Any

from docs_tables import DOCS, TASKS, difference, minilm, raw, standard_error, table, words


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
