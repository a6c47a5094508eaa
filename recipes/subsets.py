"""The subsets that some results were measured on, made again from the whole data sets.

    python recipes/subsets.py qnli_small ROWS.jsonl data       ROWS: the validation set of GLUE's QNLI
    python recipes/subsets.py codealpaca_2k ROWS.jsonl data    ROWS: the 2,017 rows of code_alpaca_2k.json
    python recipes/subsets.py xsum_small ROWS.jsonl data       ROWS: the test set of XSum

ROWS holds one JSON object a line, with the columns of the data set on the Hub. It makes data/NAME/train.jsonl.gz and
data/NAME/validation.jsonl.gz. `research/results/subsets.json` says which rows they have: by their place in QNLI, by
their id in XSum, and by a digest of instruction and input in CodeAlpaca.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUBSETS = Path(__file__).parents[1] / "research" / "results" / "subsets.json"


def known_as(name: str, row: Mapping[str, Any]) -> str:
    if name == "codealpaca_2k":
        return hashlib.sha256(f"{row['instruction']}\n{row['input']}".encode()).hexdigest()[:12]
    return str(row["idx" if name == "qnli_small" else "id"])


def main(name: str, source: str, folder: str) -> None:
    subsets = json.loads(SUBSETS.read_text(encoding="utf-8"))[name]
    with open(source, encoding="utf-8") as lines:
        rows = {known_as(name, row): row for row in map(json.loads, lines)}
    listed = {each for part in subsets.values() for each in part}
    for split in ("train", "validation"):
        chosen = subsets.get(split) or [each for each in rows if each not in listed]
        if absent := [each for each in chosen if each not in rows]:
            raise SystemExit(f"{source} lacks {len(absent)} rows of {name}, {absent[0]} the first; give the whole set")
        file = Path(folder) / name / f"{split}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(rows[each], ensure_ascii=False) + "\n" for each in chosen)
        print(f"{file}: {len(chosen)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("qnli_small", "codealpaca_2k", "xsum_small"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
