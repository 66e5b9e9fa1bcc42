from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from randlora_pl.adapters import FullFineTuning, GaLore, LoRA, RandLoRA
from randlora_pl.utils.errors import UserError
from tests.support.trace.custom_costs import CUSTOM, Cost
from tests.support.trace.fake_gpu import DEVICE, cuda_rules, fake
from tests.support.trace.recorder import Recorder, Traced
from tests.support.trace.setup import step_setup
from tests.support.trace.step import StepSetup, trace_step

TINY = {"name": "tiny", "pretrained": "random"}
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 300}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"name": "Qwen/Qwen2-0.5B-Instruct", "tokenizer": "bytes", "config_overrides": SMALL}


class Gpu:
    """The tracer around a block of a test."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @property
    def calls(self) -> list[tuple[str, Cost]]:
        return [(call.name.removeprefix("aten::"), call.cost) for call in self.recorder.traced.calls]

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    mode, recorder = FakeTensorMode(), Recorder()
    with cuda_rules(), mode, recorder:
        yield Gpu(recorder)


def test_calls_cost_what_their_shapes_say_and_views_cost_nothing(gpu: Gpu) -> None:
    x, w, y = gpu.tensor(6, 4), gpu.tensor(4, 10), gpu.tensor(6, 10)
    half = gpu.tensor(6, 4, dtype=torch.bfloat16)
    gpu.recorder.start()
    x.view(3, 8).t()[0].detach()
    torch.empty(100, device=DEVICE)
    assert x.is_cuda and not gpu.calls
    x @ w
    y.addmm_(x, w)
    x.bfloat16()
    half.to(x.device)  # it is there
    torch.zeros(5, device=x.device)
    x.copy_(half)
    x[0].expand(6, 4) + x
    F.embedding(torch.zeros(2, dtype=torch.int64, device=DEVICE), w)
    x * x
    product = 2 * 6 * 4 * 10
    assert gpu.calls == [
        ("mm", Cost(product, 4 * (24 + 40), 240)),
        ("addmm_", Cost(product, 4 * (24 + 40 + 60), 240)),
        ("_to_copy", Cost(0, 96, 48)),
        ("zeros", Cost(0, 0, 20)),
        ("copy_", Cost(0, 48, 96)),
        ("add", Cost(0, 4 * (4 + 24), 96)),
        ("zeros", Cost(0, 0, 16)),
        ("embedding", Cost(0, 16 + 80, 80)),
        ("mul", Cost(0, 96, 96)),
    ]
    traced = gpu.recorder.traced
    assert (traced.kernels, traced.casts, traced.cast_bytes, traced.flops) == (9, 2, 2 * 144, 2 * product)


def test_the_peak_is_of_what_is_alive_at_once(gpu: Gpu) -> None:
    kept = gpu.tensor(1000)
    gpu.recorder.start()
    for _ in range(3):
        kept = kept + 1
    assert gpu.recorder.traced.peak == 8000
    del kept
    gpu.recorder.start()
    assert gpu.recorder.traced.peak == 0


def test_autocast_follows_the_rules_of_cuda(gpu: Gpu) -> None:
    weight, gain = nn.Parameter(gpu.tensor(8, 8)), nn.Parameter(gpu.tensor(8))
    x = gpu.tensor(4, 8)
    gpu.recorder.start()
    with torch.autocast("cuda", torch.bfloat16):
        first = F.linear(x, weight)
        casts = gpu.recorder.traced.casts
        second = F.linear(first, weight)
        assert first.dtype == torch.bfloat16 and casts == 2 == gpu.recorder.traced.casts  # weights are cast once
        assert (
            F.layer_norm(second, [8], gain).dtype == torch.float32 and gpu.recorder.traced.casts == 3
        )  # a CPU's stays in bfloat16
        assert second.sum().dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (x @ weight.T).dtype == torch.float32
        heads = second.view(1, 2, 4, 4)
        F.scaled_dot_product_attention(heads, heads, heads)
        F.dropout(second, 0.5)
    second.sum().backward()
    names = [name for name, _ in gpu.calls]
    assert "_scaled_dot_product_flash_attention" in names and "native_dropout" in names
    assert weight.grad is not None and weight.grad.device == DEVICE


def test_outside_the_block_nothing_is_changed() -> None:
    with cuda_rules():
        pass
    assert not torch.zeros(1).is_cuda
    torch.manual_seed(0)
    assert 0 < F.dropout(torch.ones(1000), 0.5).mean() < 2


def test_a_list_of_tensors_takes_few_kernels(gpu: Gpu) -> None:
    some = [gpu.tensor(10) for _ in range(100)]
    gpu.recorder.start()
    torch._foreach_mul_(some, 2.0)
    assert gpu.calls == [("_foreach_mul_", Cost(0, 4000, 4000, 3))]


def test_a_custom_operator_has_its_own_formula(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.library.custom_op("randlora_pl_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    x = gpu.tensor(10)
    gpu.recorder.start()
    twice(x)
    monkeypatch.setitem(CUSTOM, "randlora_pl_test::twice", lambda args, result: Cost(1, 2, 3))
    twice(x)
    assert [cost for name, cost in gpu.calls if "twice" in name] == [Cost(0, 40, 40), Cost(1, 2, 3)]


@pytest.mark.slow
def test_steps_of_every_task_are_traced() -> None:
    setups = {
        "clip": StepSetup("VisionLanguageTask", TINY, 4, 2, captions=6),
        "head": StepSetup("TextHeadTask", TINY, 4),
        "vit": StepSetup("LinearHeadTask", {"name": "test_vit", "pretrained": "random"}, 4, precision="32"),
        "qwen": StepSetup("CausalLMTask", QWEN | {"gradient_checkpointing": True}, 2, 2, "bf16-frozen", tokens=16),
    }
    found: dict[str, Traced] = {}
    for name, setup in setups.items():
        found[name], trained = trace_step(setup, RandLoRA(rank=4))
        assert trained > 0 and found[name].kernels > 100 and found[name].peak > 0
        assert found[name].waits == 0
    assert found["vit"].cast_bytes < 1000 < found["clip"].cast_bytes  # labels
    names = [call.name for call in found["qwen"].calls]
    assert names.count("aten::_fused_adamw_") == 1
    with pytest.raises(UserError, match="TextClassificationTask"):
        trace_step(StepSetup("TextClassificationTask"), LoRA())


@pytest.mark.slow
def test_methods_differ_as_they_should() -> None:
    setup = StepSetup("VisionLanguageTask", TINY, 4, captions=4)
    full, _ = trace_step(setup, FullFineTuning())
    randlora, _ = trace_step(setup, RandLoRA(rank=4))
    again, _ = trace_step(setup, RandLoRA(rank=4))
    assert randlora.kernels < full.kernels and randlora.peak < full.peak  # its own kernels do the work of several
    assert randlora == again
    galore, trained = trace_step(setup, GaLore(rank=4))
    assert galore.peak < full.peak - 4 * trained  # more than one of AdamW's two moments


def test_fake_tensors_hold_no_data() -> None:
    mode = FakeTensorMode()
    huge = fake(mode, torch.empty(1 << 40, device="meta"))
    assert huge.device == DEVICE and huge.shape == (1 << 40,)


def test_steps_of_configs() -> None:
    setup, options = step_setup("commonsense_llama3", "recipes/llama3_40gb")
    assert (setup.batch_size, setup.accumulate) == (4, 4) and setup.options["gradient_checkpointing"]
    assert options["rank"] == 30
    setup, _ = step_setup("clip_vitl14")
    assert setup.task == "VisionLanguageTask"
    setup, options = step_setup("clip_vitb32", "maple_dept")
    assert (setup.task, setup.batch_size, setup.precision, options) == ("PromptTask", 4, "bf16-frozen", {})
    assert (setup.options["prompts"].depth, setup.options["head"].weight) == (9, 0.7)
