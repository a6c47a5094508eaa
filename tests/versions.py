"""Run the tests with other versions of what pedyra stands on: `python tests/versions.py lowest` (`make versions`).

A virtual environment each, in a temporary folder. Prints a row each; docs/bases.md tells them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "peft", "transformers", "accelerate", "numpy")
LOWEST = {"peft": "0.19.0", "transformers": "5.5.4", "accelerate": "1.8.0", "numpy": "1.26.4"}
COMBINATIONS: dict[str, dict[str, str]] = {
    "lowest": {"torch": "2.9.1", **LOWEST},
    "lowest beside the newest torch": LOWEST,
    "newest": {},
}
"""Name -> what is pinned. pyarrow of the last year needs numpy 2."""
TESTS = ("tests/test_upstream.py", "tests/lora", "tests/export", "tests/allocate", "tests/methods")


def run(name: str, tests: tuple[str, ...]) -> str:
    """Install a combination, run the tests in it, and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        pins = [f"{library}=={version}" for library, version in COMBINATIONS[name].items()]
        older = ["pyarrow==21.0.0"] if COMBINATIONS[name].get("numpy", "2") < "2" else []
        wanted = [f"{ROOT}[demo]", "pytest>=8.0", "beartype>=0.19", "hypothesis>=6.100", *pins, *older]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        # Warnings of older releases are not ours to mend.
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", *tests]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        shown = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
        found = subprocess.run([python, "-c", shown, *LIBRARIES], check=True, capture_output=True, text=True).stdout
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(ended.stdout, file=sys.stderr)
        last = ended.stdout.strip().splitlines()[-1].strip("= ")
        versions = " | ".join(found.split())
        return f"| {name} | {sys.version_info.major}.{sys.version_info.minor} | {versions} | {last} |"


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name in COMBINATIONS] or list(COMBINATIONS)
    tests = tuple(argument for argument in sys.argv[1:] if argument not in COMBINATIONS) or TESTS
    for name in names:
        print(run(name, tests), flush=True)
