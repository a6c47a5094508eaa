"""What docs/results.md says of planted ranks is what the raw rows in docs/results say."""

from __future__ import annotations

from statistics import mean
from typing import Any

from docs_tables import raw, short, table, words

FOUND, GIVEN = "pedyra:r=24", "pedyra:budget=fit,r=24,target_rank=4"
"""Rows of planted ranks whose size is found, and given."""
RIVALS = {
    "expand": 0.02, "elalora": 0.32, "prune": 0.02, "pedyra-paper": 0.16,
    "adalora": 0.04, "l1ra": 0.04, "lora": 0.005, "random": 0.04, "increlora": 0.08, "triadaptlora": 0.08,
}  # fmt: skip
"""Method -> its best rate on planted ranks."""


def times_the_oracle(row: dict[str, Any]) -> float:
    """How many times the error of the oracle, in the same case and seed, a row of pedyra has."""
    keys = ("architecture", "profile", "noise", "seed")
    rows = [*raw("planted"), *raw("planted_block")]
    (error,) = (r["relative_error"] for r in rows if r["method"] == "oracle" and all(r[k] == row[k] for k in keys))
    return row["relative_error"] / error


def test_planted():
    lines = table("planted")
    assert len(lines) == 6
    for line in lines:
        for method, column, exact in (
            ("lora", "LoRA", ""), ("oracle", "oracle", ""), (FOUND, "pedyra", "exact"),
        ):  # fmt: skip
            case = (method, line["network"], line["profile"], 0.5)
            rows = {
                r["seed"]: r for r in [*raw("planted"), *raw("planted_block"), *raw("fit_planted")]
                if (r["method"], r["architecture"], r["profile"], r["noise"]) == case
            }  # fmt: skip
            assert sorted(rows) == [0, 1, 2, 3, 4]
            assert line[column] == short(mean(r["relative_error"] for r in rows.values())), line
            assert not exact or line[exact] == str(sum(r["ranks"] == r["true_ranks"] for r in rows.values())), line


def test_planted_in_words():
    text = words("results")
    found = [r for r in raw("fit_planted") if r["method"] == FOUND]
    exact = [r for r in found if r["ranks"] == r["true_ranks"]]
    worst = {noise: max(times_the_oracle(r) for r in exact if r["noise"] == noise) for noise in (0, 0.5)}
    assert f"have at most {worst[0]:.2f} times the oracle's" in text and f"by up to {worst[0.5]:.2f}:" in text
    wrong = [r for r in found if r["ranks"] != r["true_ranks"]]
    more, fewer = zip(
        *(
            (sum(max(a - b, 0) for a, b in pairs), sum(max(b - a, 0) for a, b in pairs))
            for pairs in ([*zip(r["ranks"], r["true_ranks"], strict=True)] for r in wrong)
        ),
        strict=True,
    )
    assert f"holds in {len(exact)} of {len(found)} runs" in text and len(wrong) == 10
    assert {r["architecture"] for r in wrong} == {"block"} and max(fewer) == 1
    missed = [r for r in raw("fit_planted") if r["noise"] == 0 and r["ranks"] != r["true_ranks"]]
    assert {(r["architecture"], r["profile"]) for r in missed} == {("block", "sparse")}
    assert f"lose one rank or keep {min(filter(None, more))} to {max(more)} too many" in text


def test_planted_of_a_given_size():
    given = [r for r in raw("fit_planted") if r["method"] == GIVEN]
    wrong = [r for r in given if r["ranks"] != r["true_ranks"]]
    worst = max(times_the_oracle(r) for r in wrong)
    assert {r["profile"] for r in wrong} == {"sparse"}
    assert f"{len(given) - len(wrong)} of {len(given)} runs are exact too" in words("results")
    assert f"up to {worst:.1f} times the oracle's error" in words("results")


def test_planted_rivals():
    told = []
    for method, rate in RIVALS.items():
        case = (method, rate, "design", 0, "mlp")
        found = {
            r["seed"]: r for r in raw("planted_tuned") + raw("planted")
            if (r["method"], r["lr"], r["profile"], r["noise"], r["architecture"]) == case
        }  # fmt: skip
        errors, wrong = zip(
            *((found[seed]["relative_error"], found[seed]["rank_distance"]) for seed in range(3)), strict=True
        )
        told.append(
            (mean(errors), f"{mean(wrong):.0f}", {"lora": "LoRA", "adalora": "adalora-svd"}.get(method, method))
        )
    (error, wrong, best), *others = sorted(told)
    text = f"the best, {best}, has an error of {short(error)}, with {wrong} of the 48 ranks in a wrong layer, "
    assert text + ", ".join(f"{name} {short(error)} ({wrong})" for error, wrong, name in others) in words("results")
