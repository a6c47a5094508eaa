"""A file keeps the rows of a benchmark, and none is made twice."""

from __future__ import annotations

import json

from benchmarks.rows import RowFile


def test_a_file_that_a_kill_cut_short_goes_on_where_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    jobs = [{"method": "lora", "seed": seed} for seed in range(3)]
    whole = list(RowFile(path, ("method", "seed")).complete(jobs, lambda job: {"loss": job["seed"] / 2}))
    path.write_text(path.read_text()[:-20])
    made = []
    again = list(RowFile(path, ("method", "seed")).complete(jobs, lambda job: made.append(job) or {"loss": 1.0}))
    assert again == whole and made == jobs[2:]
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole


def _row(method, lr, seed, loss):
    return {"method": method, "lr": lr, "seed": seed, "loss": loss}


def test_a_row_takes_the_place_of_that_with_the_same_key(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"run": "a", "share": 0.5, "loss": 1.0}, {"run": "a", "share": 0.25, "loss": 2.0}]
    assert list(RowFile(path, ("run", "share")).keep(rows)) == rows
    again = {**rows[0], "loss": 3.0}
    list(RowFile(path, ("run", "share")).keep([again]))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [rows[1], again]


def test_rows_of_older_defaults_are_not_kept_for_new_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    old, new = ({**_row("pedyra", 1, 0, loss), "config": config} for loss, config in ((2.0, "aa"), (3.0, "bb")))
    file = RowFile(path, ("method", "config", "lr", "seed"))
    assert list(file.complete([old], lambda job: job)) == [old]
    made = list(file.complete([{name: new[name] for name in ("method", "config", "lr", "seed")}], lambda job: new))
    assert made == [new] and file.rows == [old, new]
