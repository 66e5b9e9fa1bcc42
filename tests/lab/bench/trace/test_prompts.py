"""Memory of a step with learned prompts against all classes, counted without a device."""

from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from randlora_pl.adapters import Frozen, LoRA
from randlora_pl.prompts import MaPLe
from randlora_pl.tasks import DePT, SelfRegulation
from tests.support.trace import step
from tests.support.trace.fake_gpu import DEVICE, cuda_rules, to_fake
from tests.support.trace.recorder import Recorder
from tests.support.trace.step import StepSetup, trace_step
from tests.tasks.small import two_blocks

B32 = {"name": "ViT-B-32", "pretrained": "openai"}
GB = 1e9


@two_blocks()
def test_steps_with_prompts_are_traced() -> None:
    tiny = {"name": "tiny", "pretrained": "random", "head": DePT(), "regulation": SelfRegulation(templates=1)}
    options = tiny | {"prompts": MaPLe(depth=2), "text_chunk_tokens": 64, "optimizer": "sgd"}
    setup = StepSetup("PromptTask", options, 4, 2, captions=12)
    traced, trained = trace_step(setup, LoRA(rank=2))
    assert traced.kernels > 100 and traced.waits == 0 and trained > 50_000
    peaks = {}
    for optimizer in ("adamw", "sgd"):
        options = tiny | {"prompts": MaPLe(depth=2), "regulation": None, "optimizer": optimizer}
        traced, trained = trace_step(StepSetup("PromptTask", options, 4, captions=12), Frozen())
        peaks[optimizer] = traced.peak
    assert peaks["adamw"] - peaks["sgd"] == pytest.approx(4 * trained, rel=0.05)  # two moments, or a momentum


def saved_by_texts(setup: StepSetup) -> int:
    """Bytes alive after the forward pass of the texts, beside what was there before."""
    task = step._task(setup, Frozen())
    mode, recorder = FakeTensorMode(), Recorder()
    to_fake(mode, task)
    task._device = DEVICE
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
