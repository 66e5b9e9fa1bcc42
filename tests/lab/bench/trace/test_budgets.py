"""Budgets of the shipped configs: a step must not need more kernels, casts or memory than this on a GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_pl.adapters import Frozen
from randlora_pl.adapters.operations import adapted_layers
from randlora_pl.prompts import MaPLe
from randlora_pl.tasks import DePT
from tests.adapters.kernels.triton_kernels.cases import SHAPES, calls
from tests.support.products import in_one_item, marked
from tests.support.trace import step
from tests.support.trace.costs import CUSTOM, size_of
from tests.support.trace.fake_gpu import cuda_rules, to_fake
from tests.support.trace.recorder import Recorder, Traced
from tests.support.trace.step import StepSetup, adapter_of, step_setup, trace_step

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
    found = traced(config, method)
    used = {"kernels": found.kernels, "cast MB": found.cast_bytes / 1e6, "peak GB": found.peak / 1e9}
    limits = dict(zip(used, BUDGETS[config][method], strict=True))
    assert found.waits == 0
    return [
        f"{config}, {method}: {name} {used[name]:,.2f} > {limit}"
        for name, limit in limits.items()
        if used[name] > limit
    ]


@pytest.mark.parametrize(("config",), marked(zip(BUDGETS), lambda row: row[0] == "tiny_clip"))
def test_a_step_stays_within_its_budget(config: str) -> None:
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


B32 = {"name": "ViT-B-32", "pretrained": "openai"}
GB = 1e9


def saved_by_texts(setup: StepSetup) -> int:
    """Bytes alive after the forward pass of the texts, beside what was there before."""
    task = step._module(setup, Frozen()).objective
    mode, recorder = FakeTensorMode(), Recorder()
    to_fake(mode, task)
    with cuda_rules(), mode, recorder:
        recorder.hold([*task.parameters(), *task.buffers()])
        before = recorder._live
        with step._precision(setup):
            features = task._texts(task.model)
        assert features.requires_grad
        return recorder._live - before


@pytest.mark.full
def test_a_thousand_classes_fit_beside_the_weights() -> None:
    options: dict[str, Any] = B32 | {"prompts": MaPLe()}
    weights = 4 * 151_277_313
    peaks = {}
    for name, head, count in (("MaPLe", None, 3_555_072), ("MaPLe + DePT", DePT(), 4_070_120)):
        setup = StepSetup("PromptTask", options | {"head": head}, 4, captions=1000)
        traced, trained = trace_step(setup, Frozen())
        assert trained == count
        peaks[name] = (traced.peak - weights) / GB
    whole = saved_by_texts(StepSetup("PromptTask", options | {"text_chunk_tokens": 10**9}, 4, captions=1000)) / GB
    texts = saved_by_texts(StepSetup("PromptTask", options, 4, captions=1000)) / GB
    assert max(peaks.values()) < 2 and texts < 0.3 < whole


class Addresses:
    """Distinct bytes that kernels load and store, and all those of PyTorch's operators after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.read: set[tuple[int, int]] = set()
        self.written: set[tuple[int, int]] = set()
        self.more = [0, 0]
        for name, to in (("create_masked_load", "read"), ("create_masked_store", "written")):
            monkeypatch.setattr(InterpreterBuilder, name, self._noting(getattr(InterpreterBuilder, name), to))

    def _noting(self, original: Callable[..., Any], to: str) -> Callable[..., Any]:
        def noted(builder: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0] if to == "read" else rest[1]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            getattr(self, to).update((int(address), size) for address in pointers.data[mask.data].ravel())
            return original(builder, pointers, *rest)

        return noted

    def bytes(self) -> tuple[int, int]:
        read, written = (sum(size for _, size in some) for some in (self.read, self.written))
        return read + self.more[0], written + self.more[1]


class After(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: Addresses) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith(("aten::sum", "aten::_to_copy")):
            self.found.more[0] += size_of(args[0])
            self.found.more[1] += size_of(result)
        return result


ROWS = [
    ("ViT-B/32: n r = d", torch.float32, False),
    ("odd n r, odd sides", torch.float16, True),
    ("Qwen2: D cut off in a block", torch.float32, False),
]


@pytest.mark.slow
@in_one_item(("name", "dtype", "peft"), ROWS)
def test_formulas_count_the_loads_and_stores_of_the_interpreter(name: str, dtype: torch.dtype, peft: bool) -> None:
    pytest.importorskip("triton")
    seen = set()
    for call in calls(SHAPES[name], dtype, peft):
        operator = call.operator._opoverload
        with pytest.MonkeyPatch.context() as patch:
            found = Addresses(patch)
            with After(found):  # a mode outside of an operator would not see what it calls
                result = call.operator._init_fn(*call.args)
        cost = CUSTOM[operator.name()](call.args, result)
        assert found.bytes() == (cost.read, cost.written), operator
        assert (cost.launches > 1) == (found.more != [0, 0])
        seen.add(operator.name())
    assert seen == set(CUSTOM)


def test_every_custom_operator_has_a_formula() -> None:
    pytest.importorskip("triton")
    from randlora_pl.adapters.kernels import triton_kernels

    defined = {
        value._opoverload.name()
        for value in vars(triton_kernels).values()
        if isinstance(value, torch.library.CustomOpDef)
    }
    assert defined == set(CUSTOM)
