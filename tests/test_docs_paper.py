"""The tables of docs/paper.md that are marked say what the raw rows in docs/results say."""

from __future__ import annotations

import re
from statistics import mean

from docs_tables import TASKS, Rows, bootstrap_interval, minilm, points, raw, spread, standard_error, table, words
from scipy.stats import binomtest


def test_paper_glue():
    lines = table("paper glue", "paper")
    assert len(lines) == 4
    for line in lines:
        task, steps = line["task, steps"].split(", ")
        for rank in ("8", "2"):
            metric = "matthews" if task == "CoLA" else "accuracy"
            methods = minilm()[TASKS[task], steps, rank]
            found = {name: [100 * rows[seed][metric] for seed in range(5)] for name, rows in methods.items()}
            assert rank == "2" or line["LoRA"] == spread(found["lora"])
            for shown, method in (("AdaLoRA", "adalora"), ("PE-DyRA", "pedyra-paper")):
                better = [ours - lora for ours, lora in zip(found[method], found["lora"], strict=True)]
                low, high = bootstrap_interval(better) or (0.0, 0.0)
                assert low < 0 < high if rank == "2" else line[f"{shown} less LoRA"] == points(better), (task, method)


def test_paper_table_13():
    values = {row["row"]: row["values"] for row in raw("paper_table13")}

    def less(task: str) -> str:
        ours, lora = values[f"{task}, PE-DyRA"], values[f"{task}, LoRA"]
        return points([ours[seed] - lora[seed] for seed in lora])

    assert f"PE-DyRA less LoRA is {less('CoLA')} on CoLA and {less('MRPC')} on MRPC" in words("paper")


def told(rows: Rows, errors: bool) -> str:
    """What a figure's rows measured, column by column, with standard errors or without."""
    columns: dict[str, list[str]] = {}
    for row in rows:
        alone = sum(other["column"] == row["column"] for other in rows) == 1
        value = f"{row['measured']:.3g}" + (f" ± {row['standard_error']:.1g}" if errors else "")
        name = "" if alone and row["row"] == "PE-DyRA" else f"{row['row']} "
        columns.setdefault(row["column"], []).append(name + value)
    return "; ".join(f"{column}: {', '.join(values)}" for column, values in columns.items())


def test_paper_figures():
    rows = raw("paper_figures")
    lines = table("paper figures", "paper")
    assert [line["figure"] for line in lines] == ["1a", "1b", "3", "4b", "5", "7", "8", "9", "10", "11"]
    for line in lines:
        own = [row for row in rows if row["id"] == f"figure{line['figure']}"]
        alone = any("[" not in part for part in line["verdict"].split(";"))  # what has no interval has standard errors
        assert line["measured"] == told(own, errors=alone) and {row["seeds"] for row in own} == {3}
        differences = {
            f"{mean(d):+.3g} [{low:+.3g}, {high:+.3g}]"
            for row in own for other in own
            if row["column"] == other["column"] and row["row"] != other["row"]
            and any(d := [row["values"][seed] - other["values"][seed] for seed in row["values"]])
            for low, high in [bootstrap_interval(d) or (0.0, 0.0)]
        }  # fmt: skip
        assert all(found in differences for found in re.findall(r"[+-][\d.]+ \[[^]]+\]", line["verdict"])), line


def test_paper_sst2():
    """Each row, and how far it is from the one that it is compared with."""
    rows = {}
    for row in raw("paper_sst2"):
        name = row["column"] if row["id"] == "table14" else row["row"].replace("importance", "PE-DyRA")
        again = next((each for (_, other), each in rows.items() if other == name), row)
        assert again["values"] == row["values"], name  # the ids share their runs
        rows[row["id"].replace("table", "").replace("figure", "Fig. "), name] = row
    lines = table("paper sst2", "paper")
    assert {line["row"].partition(", less ")[0] for line in lines} == {name for _, name in rows} - {"LoRA", "k=12"}
    for line in lines:
        name, _, less = line["row"].partition(", less ")
        for where in line["table"].split(", "):
            row, other = rows[where, name], rows[where, less or "LoRA"]
            assert row["seeds"] == other["seeds"] == 3
            better = [row["values"][seed] - other["values"][seed] for seed in row["values"]]
            assert line["difference"] == points(better), line
            if line["published"]:
                assert line["published"] == f"{row['published'] - other['published']:+.2f}"
    lora = rows["2", "LoRA"]
    assert f"accuracy is {lora['measured']:.1f} ± {lora['standard_error']:.1f};" in words("paper")


def test_paper_code():
    rows = raw("paper_code")
    sets = {"HumanEval": "humaneval", "HumanEval+": "humanevalplus", "MBPP": "mbpp", "MBPP+": "mbppplus"}
    lines = table("paper code", "paper")
    for line, model in zip(
        lines,
        ("before", "lora", "lora, cut", "dora", "qlora", "pedyra-paper, 4 bits", "no input score", "pedyra-paper"),
        strict=True,
    ):
        for shown, key in sets.items():
            own = [row["status"] for row in rows if (row["model"], row["set"]) == (model, key)]
            if not own:
                assert not line[shown] and key.startswith("mbpp" if model == "before" else "humaneval")
                continue
            passed = own.count("passed")
            low, high = binomtest(passed, len(own)).proportion_ci(method="wilson")
            assert len(own) == 20 and line[shown] == str(passed)
            assert round(20 * (high - low)) in (7, 8)
        (perplexity,) = (row["value"] for row in rows if (row["model"], row["set"]) == (model, "perplexity"))
        assert line["perplexity"] == f"{perplexity:.3f}"


def test_paper_gsm8k():
    (row,) = raw("paper_gsm8k")
    low, high = binomtest(row["solved"], row["problems"]).proportion_ci(method="wilson")
    assert f"{row['solved']} of {row['problems']} answers are right [{low:.0%}, {high:.0%}], all end" in words("paper")
    assert row["unfinished"] == row["unparsable"] == 0


def test_paper_squad():
    rows = raw("paper_squad")

    def told(values: list[float]) -> str:
        return f"{100 * mean(values):.1f} ± {196 * (standard_error(values) or 0):.1f}"

    f1, exact = told([row["f1"] for row in rows]), told([row["exact"] for row in rows])
    nothing = told([float(not row["answerable"]) for row in rows])
    assert f"F1 is {f1} and exact match {exact}; where no question is answered both are {nothing}" in words("paper")
    some, none = (told([row["f1"] for row in rows if row["answerable"] == kind]) for kind in (True, False))
    assert f"HasAns F1 is {some} and NoAns F1 {none}:" in words("paper")
