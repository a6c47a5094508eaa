"""environment.json: where a run was made."""

from __future__ import annotations

import pytest
import torch

from pedyra.app.runs.environment import describe_environment


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_a_device_that_is_no_cuda_one_is_named_by_its_type(device):
    assert describe_environment(0, torch.device(device))["device"] == device
