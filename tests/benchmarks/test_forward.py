"""The forward pass of an adapter of each rank beside the base model's."""

from __future__ import annotations

import pytest
from torch import nn

from benchmarks.forward import bench_forward
from benchmarks.models import bench_model


def test_each_rank_has_its_time_and_its_size():
    rows = list(bench_forward("llama-32x2", [8, 2], rounds=4))
    assert [row["rank"] for row in rows] == [8, 2]
    linears = [each for name, each in bench_model("llama-32x2").build().named_modules()
               if isinstance(each, nn.Linear) and "lm_head" not in name]  # fmt: skip
    width = sum(each.in_features + each.out_features for each in linears)
    for row in rows:
        assert row["megabytes"] == pytest.approx(4 * row["rank"] * width / 1e6)
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
