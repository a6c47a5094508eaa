"""`pedyra bench transfer`: the model of its texts, rows that survive a kill, and a table of each method at its rate."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import same_bits
from typer.testing import CliRunner

from pedyra.lab.bench.rows import PLANTED_KEY, TRANSFER_KEY, RowFile, rates_by_method, shown, summary
from pedyra.lab.bench.transfer import (
    CONTEXT,
    SMOKE,
    ByteTransformer,
    bench_transfer,
    code,
    held_out_loss,
    pretrained,
    prose,
)
from pedyra.lab.cli import app


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PEDYRA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_held_out_text_is_not_in_the_training_text():
    for corpus in (prose(), code()):
        assert 0.02 < len(corpus.held_out) / len(corpus.train) < 0.5
        train = bytes(corpus.train.to(torch.uint8).tolist())
        pieces = [bytes(window.to(torch.uint8).tolist()) for window in corpus.windows(20)]
        assert sum(piece in train for piece in pieces) <= 2  # licences and boilerplate repeat


def test_rotated_prose_is_the_prose_letter_by_letter():
    plain, turned = prose(), prose(rotated=True)
    assert bytes(turned.train[:200].tolist()).decode() == codecs.encode(
        bytes(plain.train[:200].tolist()).decode(), "rot13"
    )
    assert len(plain.held_out) == len(turned.held_out) and plain.digest != turned.digest


def test_an_unknown_target_is_refused():
    result = CliRunner().invoke(app, ["bench", "transfer", "--smoke", "--target", "latin"])
    assert result.exit_code == 2 and "latin" in result.output


def test_the_loss_is_nats_per_byte_and_uniform_logits_cost_log_256():
    model = ByteTransformer(width=8, depth=1).requires_grad_(False)
    windows = code().windows(5)
    slow = [F.cross_entropy(model(window[None, :-1])[0], window[1:]) for window in windows]
    assert held_out_loss(model, windows, chunk=2) == pytest.approx(float(sum(slow)) / 5, rel=1e-5)
    model.head.weight.zero_()
    assert held_out_loss(model, windows) == pytest.approx(math.log(256))


def test_no_byte_sees_a_later_one():
    model = ByteTransformer(width=8, depth=2)
    tokens = code().windows(1)[:, :CONTEXT]
    changed = tokens.clone()
    changed[0, 40:] = 7
    before, after = model(tokens), model(changed)
    assert same_bits(before[0, :40], after[0, :40]) and not torch.allclose(before[0, 40:], after[0, 40:])


def test_the_pretrained_model_comes_from_the_cache_the_second_time(monkeypatch):
    first = pretrained(prose(), steps=2, width=8, depth=1)
    monkeypatch.setattr("pedyra.lab.bench.transfer.pretrain", lambda *args, **kwargs: pytest.fail("trained again"))
    second = pretrained(prose(), steps=2, width=8, depth=1)
    assert all(same_bits(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(p.requires_grad for p in second.parameters())


def test_a_killed_grid_goes_on_where_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    arguments: dict[str, Any] = dict(lrs=[0.01], seeds=[0, 1], size=SMOKE)
    whole = list(bench_transfer(["lora", "pedyra:moves=2"], **arguments, file=RowFile(path, TRANSFER_KEY)))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:50])
    again = list(bench_transfer(["lora", "pedyra:moves=2"], **arguments, file=RowFile(path, TRANSFER_KEY)))
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]  # the same run, to the last bit
    assert [row["seconds"] for row in again[:2]] == [row["seconds"] for row in whole[:2]]
    assert len(path.read_text().splitlines()) == 4
    monkeypatch.setattr("pedyra.lab.bench.transfer.run_method", lambda *a, **k: pytest.fail("made again"))
    list(bench_transfer(["lora", "pedyra:moves=2"], **arguments, file=RowFile(path, TRANSFER_KEY)))


def test_what_a_method_refuses_at_some_rank_is_told_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("pedyra.lab.bench.transfer.pretrained", lambda *a, **k: pytest.fail("trained"))
    arguments: dict[str, Any] = dict(lrs=[0.01], seeds=[0], ranks=[2, 4], size=SMOKE)
    with pytest.raises(ValueError, match="starts at rank 4; raise max_rank"):
        next(bench_transfer(["lora", "pedyra:max_rank=3"], **arguments, file=RowFile(None, TRANSFER_KEY)))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ({"metric": "loss"}, dict.fromkeys(PLANTED_KEY, 1)):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="rows of something else; name another file"):
            RowFile(path, TRANSFER_KEY)


def _row(method, lr, seed, loss):
    return {"method": method, "lr": lr, "seed": seed, "loss": loss}


def test_a_row_takes_the_place_of_that_with_the_same_key(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"run": "a", "share": 0.5, "loss": 1.0}, {"run": "a", "share": 0.25, "loss": 2.0}]
    assert list(RowFile(path, ("run", "share")).keep(rows)) == rows
    again = {**rows[0], "loss": 3.0}
    list(RowFile(path, ("run", "share")).keep([again]))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [rows[1], again]


def test_each_method_is_compared_at_its_own_best_rate():
    rows = [
        *(_row("lora", lr, seed, loss + seed) for lr, loss in ((1, 3.0), (2, 2.0), (4, 2.5)) for seed in (0, 1, 2)),
        *(_row("pedyra:moves=2", 1, seed, 1.5 + seed) for seed in (0, 1, 2)),
        *(_row("pedyra:moves=2", 2, seed, 9.0) for seed in (0, 1, 2)),
        _row("pedyra:moves=2", 4, 0, 0.1),  # one lucky seed does not choose the rate
        *(_row("bad", 1, seed, None) for seed in (0, 1)),
    ]
    lora, pedyra, bad = summary(rows, "loss")
    assert (lora["lr"], lora["loss"], lora["edge"], lora["less lora"]) == (2, 3.0, "", None)
    assert (pedyra["method"], pedyra["lr"], pedyra["edge"]) == ("pedyra:moves=2", 1, "lowest")
    assert pedyra["less lora"] == pytest.approx(-0.5)
    assert pedyra["95 %"] == pytest.approx((-0.5, -0.5))  # the same at every seed
    assert (bad["95 %"], shown(bad["loss"])) == (None, "diverged")


def test_rows_of_older_defaults_are_neither_kept_for_new_ones_nor_mixed_with_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    old, new = ({**_row("pedyra", 1, 0, loss), "config": config} for loss, config in ((2.0, "aa"), (3.0, "bb")))
    file = RowFile(path, ("method", "config", "lr", "seed"))
    assert list(file.complete([old], lambda job: job)) == [old]
    made = list(file.complete([{name: new[name] for name in ("method", "config", "lr", "seed")}], lambda job: new))
    assert made == [new] and file.rows == [old, new]
    assert rates_by_method(file.rows) == {"pedyra": {1: {0: new}}}
    assert rates_by_method([{**old, "lr": 9}, new]) == {"pedyra": {1: {0: new}}}


def test_what_is_printed_is_of_the_rates_that_were_asked_for(tmp_path):
    """The file holds a lower rate that did best; it stays there, and has no part in the table."""
    file = tmp_path / "rows.jsonl"
    arguments = ["--smoke", "--steps", "25", "--method", "lora", "--json", str(file)]
    assert CliRunner().invoke(app, ["bench", "transfer", *arguments, "--lr", "1e-4"]).exit_code == 0
    (row,) = map(json.loads, file.read_text().splitlines())
    file.write_text(json.dumps({**row, "loss": 0.5}) + "\n")
    result = CliRunner().invoke(app, ["bench", "transfer", *arguments, "--lr", "1e-2"])
    assert result.exit_code == 0, result.output
    table = result.output.partition("held-out loss")[2]
    assert "0.01" in table and "0.0001" not in table and "ends the grid" not in table
    assert [json.loads(line)["lr"] for line in file.read_text().splitlines()] == [1e-4, 1e-2]


def test_the_command_prints_the_table_and_a_warning_at_the_edge(tmp_path):
    file = tmp_path / "rows.jsonl"
    arguments = ["--smoke", "--steps", "25", "--seeds", "1", "--json", str(file)]
    methods = ["--method", "lora", "--method", "lora+:ratio=4"]
    result = CliRunner().invoke(app, ["bench", "transfer", *methods, "--lr", "1e-4", "--lr", "1e-2", *arguments])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4 and {row["steps"] for row in rows} == {25}
    assert {row["method"] for row in rows} == {"lora", "lora+:ratio=4"}
    # Width 32: a rank of q, k, v, o has 64 parameters, one of up and down 160; two blocks.
    assert {row["parameters"] for row in rows} == {2 * 2 * (4 * 64 + 2 * 160)}
    assert "less lora" in result.output and "ends the grid, so widen it: lora" in result.output
