"""Names of layers: what a reader calls them, whatever the model calls them."""

from __future__ import annotations

from pedyra.report.layers import make_layers


def row(name: str, kind: str, depth: int) -> dict:
    return {"name": name, "type": kind, "depth": depth, "rank": 8}


def named(*rows: dict) -> list[tuple[str, int | None, str]]:
    return [(layer.type, layer.depth, layer.short_name) for layer in make_layers(rows)]


def test_recorded_types_are_kept_where_they_tell_the_layers_apart():
    rows = row("model.layers.3.mlp.up_proj", "up", 3), row("model.layers.4.mlp.up_proj", "up", 4)
    assert named(*rows) == [("up", 3, "up 3"), ("up", 4, "up 4")]


def test_the_three_dense_layers_of_a_bert_block_are_told_apart_by_their_paths():
    block = "bert.encoder.layer.0."
    rows = [
        row(block + "attention.self.query", "query", 0),
        row(block + "attention.output.dense", "dense", 0),
        row(block + "intermediate.dense", "dense", 0),
        row(block + "output.dense", "dense", 0),
        row("bert.pooler.dense", "dense", 0),
    ]
    assert named(*rows) == [
        ("query", 0, "query 0"),
        ("attention.output.dense", 0, "attention.output.dense 0"),
        ("intermediate.dense", 0, "intermediate.dense 0"),
        ("output.dense", 0, "output.dense 0"),
        ("pooler.dense", None, "pooler.dense"),
    ]


def test_experts_of_one_block_share_a_type_and_keep_their_full_names():
    names = [f"model.layers.1.experts.{expert}.up_proj" for expert in range(2)]
    assert named(*(row(name, "up_proj", 1) for name in names)) == [("up_proj", 1, name) for name in names]
