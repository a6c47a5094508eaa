"""Short versions of the soaks, whose long ones docs/reliability.md has the figures of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kills import by_command, soak


def test_a_training_that_is_killed_and_resumed_ends_as_the_unbroken_one(tmp_path):
    assert soak(2, 3, tmp_path, ways=[(by_command, 1)]) == {"kills": 2, "trainings": 1, "equal": 1}


def test_spoilt_inputs_are_read_or_refused_in_one_line():
    fuzz = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--inputs", "120", "--seed", "1"]
    done = subprocess.run(fuzz, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
