"""The eight GLUE tasks of the paper: columns, official metrics, and which metric is judged.

A run reports every metric of its kind; `metric` is the one judged, which is the column of the paper's Table 2:
accuracy, but Matthews correlation for CoLA and "Corr." for STS-B, read as Pearson's. The other official metrics are
among those reported: F1 of MRPC and QQP, Spearman's correlation of STS-B and `combined`, the mean of its two, which is
GLUE's own score. MNLI is judged on the matched set; `mismatched_accuracy` is what `pedyra eval` adds.
"""

from __future__ import annotations

from typing import Any

HUB = "nyu-mll/glue"

GLUE: dict[str, dict[str, Any]] = {
    "cola": {"kind": "classification", "text": "sentence", "metric": "matthews"},
    "sst2": {"kind": "classification", "text": "sentence", "metric": "accuracy"},
    "mrpc": {"kind": "pairs", "text": "sentence1", "text_pair": "sentence2", "metric": "accuracy"},
    "qqp": {"kind": "pairs", "text": "question1", "text_pair": "question2", "metric": "accuracy"},
    "stsb": {"kind": "regression", "text": "sentence1", "text_pair": "sentence2", "metric": "pearson"},
    "mnli": {"kind": "pairs", "text": "premise", "text_pair": "hypothesis", "metric": "accuracy"},
    "qnli": {"kind": "pairs", "text": "question", "text_pair": "sentence", "metric": "accuracy"},
    "rte": {"kind": "pairs", "text": "sentence1", "text_pair": "sentence2", "metric": "accuracy"},
}
"""Keys of `data` by task; labels are the Hub's numbers."""
