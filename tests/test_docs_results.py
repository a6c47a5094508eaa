"""The tables of docs/results.md that are marked say what the raw rows in docs/results say."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from docs_tables import TASKS, bootstrap_interval, difference, minilm, raw, standard_error, table, words

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
