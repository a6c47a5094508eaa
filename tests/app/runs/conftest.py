"""The recipe of a short run, and Ctrl-C in the middle of one."""

import signal

import pytest
from short_runs import RECIPE, named

from pedyra.app.recipe import Recipe
from pedyra.app.runs.callbacks import MetricsLog


@pytest.fixture
def recipe(tmp_path):
    """recipe(method=..., **sections): the small recipe above with changes, writing to tmp_path/run."""

    def make(method="lora", output="run", **changes):
        content = {**RECIPE, "method": named(method), "output_dir": str(tmp_path / output)}
        for section, values in changes.items():
            content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
        return Recipe.model_validate(content)

    return make


@pytest.fixture
def interrupt_at(monkeypatch):
    """interrupt_at(step): Ctrl-C while that step is taken, once."""

    def arm(step):
        original = MetricsLog.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                monkeypatch.setattr(MetricsLog, "on_step_end", original)
                signal.raise_signal(signal.SIGINT)
            return original(self, args, state, control, **kwargs)

        monkeypatch.setattr(MetricsLog, "on_step_end", on_step_end)

    return arm
