"""environment.json: where a run was made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process of its own is in /proc")
def test_the_peak_of_a_run_is_not_that_of_the_process_that_started_it():
    code = (
        "import torch; from pedyra.app.runs.environment import peak_memory_bytes as peak; "
        "print(peak(torch.device('cpu')))"
    )
    alone = int(subprocess.check_output([sys.executable, "-c", code]))
    held = torch.ones(2 * alone, dtype=torch.uint8)
    assert int(subprocess.check_output([sys.executable, "-c", code])) < 1.5 * alone < held.numel()
