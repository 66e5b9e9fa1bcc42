"""Budgets of the shipped configs: a step must not need more kernels, casts or memory than this on a GPU.

Lower them after an improvement.
"""

from dataclasses import replace
from typing import Any

import pytest

from randlora_pl.adapters.operations import adapted_layers
from tests.support.trace import step
from tests.support.trace.recorder import Traced
from tests.support.trace.setup import adapter_of, step_setup
from tests.support.trace.step import trace_step

DENSE, HADAMARD = "randlora", "randlora-hadamard"
BUDGETS: dict[str, dict[str, tuple[int, int, float]]] = {
    "tiny_clip": {DENSE: (558, 40.2, 0.104)},
    "clip_vitb32": {DENSE: (1004, 153, 4.65), HADAMARD: (1148, 153, 3.95)},
    "clip_vitl14": {DENSE: (2672, 181, 17.45), HADAMARD: (3034, 181, 14.8)},
    "clip_vith14": {DENSE: (3614, 207, 33.9), HADAMARD: (4427, 207, 27.6)},
    "commonsense_qwen2": {DENSE: (5499, 7461, 1.8), HADAMARD: (5643, 7461, 1.8)},
    "commonsense_llama3": {DENSE: (5602, 6381, 41.7), HADAMARD: (5762, 6381, 41.3)},
}
"""Kernels, MB read and written by casts, and GB at the peak, by config and method."""
MORE: dict[str, dict[str, Any]] = {"tiny_clip": {"precision": "bf16"}}
"""What a step has instead of its config's."""


def traced(config: str, method: str) -> Traced:
    setup, options = step_setup(config)
    return trace_step(replace(setup, **MORE.get(config, {})), adapter_of(method, options))[0]


def exceeded(config: str, method: str) -> list[str]:
    """Trace a step, and return what exceeds its budget."""
    found = traced(config, method)
    used = {"kernels": found.kernels, "cast MB": found.cast_bytes / 1e6, "peak GB": found.peak / 1e9}
    limits = dict(zip(used, BUDGETS[config][method], strict=True))
    assert found.waits == 0
    return [
        f"{config}, {method}: {name} {used[name]:,.2f} > {limit}"
        for name, limit in limits.items()
        if used[name] > limit
    ]


@pytest.mark.parametrize("config", ["tiny_clip", pytest.param("clip_vitb32", marks=pytest.mark.slow)])
def test_a_step_stays_within_its_budget(config: str) -> None:
    assert exceeded(config, DENSE) == []


@pytest.mark.full
@pytest.mark.parametrize("config", BUDGETS)
def test_steps_of_every_config_stay_within_their_budgets(config: str) -> None:
    assert [fault for method in BUDGETS[config] for fault in exceeded(config, method)] == []


def test_one_more_cast_in_each_layer_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    original = step.to_fake

    def with_casts(mode: Any, task: Any) -> None:
        original(mode, task)
        for layer in adapted_layers(task.backbone).values():
            layer.register_forward_pre_hook(lambda _, args: (args[0].float().bfloat16(), *args[1:]))

    monkeypatch.setattr(step, "to_fake", with_casts)
    faults = exceeded("tiny_clip", DENSE)
    assert len(faults) >= 2 and "kernels" in faults[0] and "cast MB" in faults[1]
