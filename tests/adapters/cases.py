"""The methods, layers and shapes that the contract runs over, and small things that many tests do."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from torch import Tensor, nn

from randlora_pl.adapters import (
    OFT,
    PRANC,
    SVFT,
    AdaLoRA,
    Adapter,
    AutoLoRA,
    BitFit,
    DoRA,
    Fira,
    FullFineTuning,
    GaLore,
    HiRA,
    HydraLoRA,
    InjectionReport,
    KRAdapter,
    LinearProbe,
    LoRA,
    LoRAXS,
    NoLA,
    PiSSA,
    RandLoRA,
    SHiRA,
    Together,
    VeRA,
    inject,
    make_optimizer,
    trainable_parameters,
)
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.save_load import CONFIG, TENSORS
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.testing import Conv1D

# Each takes the rank and ``qkv``. Scalings are large so that updates are of the size of the weights.
METHODS: dict[str, Callable[..., Adapter]] = {
    "randlora": lambda r, qkv: RandLoRA(rank=r, qkv=qkv),
    "randlora-lambda": lambda r, qkv: RandLoRA(rank=r, init="lambda", qkv=qkv),
    "randlora-peft": lambda r, qkv: RandLoRA(rank=r, pairing="peft", qkv=qkv),
    "randlora-floor+1": lambda r, qkv: RandLoRA(rank=r, num_bases="floor+1", qkv=qkv),
    "randlora-normal": lambda r, qkv: RandLoRA(rank=r, basis="normal", qkv=qkv),
    "randlora-hadamard": lambda r, qkv: RandLoRA(rank=r, basis="hadamard", qkv=qkv),
    "randlora-hadamard-a": lambda r, qkv: RandLoRA(rank=r, basis="hadamard", variant="a", qkv=qkv),
    "randlora-hadamard-b-fast": lambda r, qkv: RandLoRA(rank=r, basis="hadamard", variant="b", memory="fast", qkv=qkv),
    "randlora-low": lambda r, qkv: RandLoRA(rank=r, memory="low", qkv=qkv),
    "randlora-ternary": lambda r, qkv: RandLoRA(rank=r, basis="ternary", sparsity=3, qkv=qkv),
    "randlora-lead": lambda r, qkv: RandLoRA(rank=r, lead=2, qkv=qkv),
    "randlora-a": lambda r, qkv: RandLoRA(rank=r, variant="a", qkv=qkv),
    "randlora-b": lambda r, qkv: RandLoRA(rank=r, variant="b", qkv=qkv),
    "lora": lambda r, qkv: LoRA(rank=r, alpha=4.0, qkv=qkv),
    "lora-rs": lambda r, qkv: LoRA(rank=r + 4, alpha=2.0, rslora=True, qkv=qkv),  # high enough to build W0 + B A
    "adalora": lambda r, qkv: AdaLoRA(rank=r, alpha=100.0, qkv=qkv),
    "vera": lambda r, qkv: VeRA(rank=30, alpha=30.0, qkv=qkv),  # more than any side
    "pissa": lambda r, qkv: PiSSA(rank=r, alpha=2.0 * r, qkv=qkv),
    "olora": lambda r, qkv: PiSSA(rank=r, start="olora", qkv=qkv),
    "minor": lambda r, qkv: PiSSA(rank=r, start="minor", qkv=qkv),
    "loraxs": lambda r, qkv: LoRAXS(rank=r, balance="both", qkv=qkv),
    "nola": lambda r, qkv: NoLA(rank=r, num_bases=16, alpha=1.0, qkv=qkv),
    "nola-official": lambda r, qkv: NoLA(rank=r, num_bases=16, alpha=1.0, init="official", qkv=qkv),
    "pranc": lambda r, qkv: PRANC(coefficients=50, qkv=qkv),
    "pranc-dense": lambda r, qkv: PRANC(coefficients=50, form="dense", qkv=qkv),
    "kradapter": lambda r, qkv: KRAdapter(alpha=4.0, qkv=qkv),
    "shira": lambda r, qkv: SHiRA(rank=2, qkv=qkv),
    "shira-top": lambda r, qkv: SHiRA(rank=3, places="top", qkv=qkv),
    "svft": lambda r, qkv: SVFT(pattern="banded", off_diagonals=2, qkv=qkv),
    "dora": lambda r, qkv: DoRA(LoRA(rank=r, alpha=4.0, qkv=qkv)),
    "dora-randlora": lambda r, qkv: DoRA(RandLoRA(rank=r, qkv=qkv)),
    "oft": lambda r, qkv: OFT(block=min(r, 6) + r // 5, qkv=qkv),
    "oft-neumann": lambda r, qkv: OFT(neumann_terms=5, qkv=qkv),
    "hira": lambda r, qkv: HiRA(rank=r, qkv=qkv),
    "hydralora": lambda r, qkv: HydraLoRA(rank=r, heads=3, alpha=4.0, qkv=qkv),
    "fira": lambda r, qkv: Fira(rank=r),
    "autolora": lambda r, qkv: AutoLoRA(rank=r, alpha=4.0 * r, qkv=qkv),
    "autolora-bases": lambda r, qkv: AutoLoRA(rank=r, alpha=10.0, select="bases", qkv=qkv),
    "together": lambda r, qkv: Together([LoRA(rank=r, alpha=4.0, qkv=qkv), RandLoRA(rank=r, qkv=qkv)]),
    "full": lambda r, qkv: FullFineTuning(),
    "galore": lambda r, qkv: GaLore(rank=r),
    "bitfit": lambda r, qkv: BitFit(),
    "probe": lambda r, qkv: LinearProbe(),
}
WHOLE = ("fira", "full", "galore", "bitfit", "probe")
UNFIXED = ("hydralora",)
"""Methods whose update depends on the input, so that it is not a matrix."""
EXCEPT = {
    "nola-official": ("start",),  # whose factors both begin at random values
    "dora": ("exact gradients",),  # whose norm is a constant for the gradient
    "dora-randlora": ("exact gradients",),
}
"""Checks of `randlora_pl.testing` that a method breaks on purpose."""


class One(nn.Module):
    """A single linear layer under a name."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, out_features)
        self.features = in_features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


def adapted_one(
    adapter: Adapter, in_features: int = 12, out_features: int = 20, dtype: torch.dtype = torch.float32
) -> tuple[One, Any]:
    """A single linear layer with an update, and the update."""
    model = One(in_features, out_features).to(dtype)
    inject(model, adapter, ["fc"])
    return model, model.fc.delta


class OneConv1D(nn.Module):
    """A single ``Conv1D`` under a name."""

    def __init__(self, in_features: int, out_features: int, name: str = "fc") -> None:
        super().__init__()
        self.add_module(name, Conv1D(out_features, in_features))
        self.features, self.name = in_features, name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self.name)(x)
        return out


class FewHeads(nn.Module):
    """A fused q/k/v projection with fewer heads for k and v than for q, named as in Phi-3 of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_heads, self.features = 4, 2, 16
        self.qkv_proj = nn.Linear(16, 16 + 8 + 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.qkv_proj(x)
        return out


class SelfAttention(nn.Module):
    """PyTorch's attention layer, attending to its own input as a transformer block does."""

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(features, 3, batch_first=True, **options)
        nn.init.normal_(self.attn.in_proj_bias, std=0.2)
        nn.init.normal_(self.attn.out_proj.bias, std=0.2)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return out


class TimmAttention(nn.Module):
    """timm's attention layer, whose packed q/k/v weight is an ``nn.Linear``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attn = Attention(features, num_heads=3, qkv_bias=True)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x)
        return out


class Convolution(nn.Module):
    """A convolution over (batch, length, features), whose square kernel sees neighbours in both directions."""

    def __init__(self, features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        self.sums = nn.Conv2d(features, out_features, **options)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (1, -1)).expand(-1, -1, 3, -1)
        out: Tensor = self.sums(image).mean(2).transpose(1, 2)
        return out


@dataclass(frozen=True)
class Kind:
    """A layer to adapt: the model around it, its targets, a rank, and how packed weights are taken."""

    build: Callable[[], nn.Module]
    targets: list[str]
    rank: int = 4
    qkv: str = "packed"


KINDS: dict[str, Kind] = {
    "linear-in<out": Kind(lambda: One(12, 20), ["fc"]),
    "linear-in>out": Kind(lambda: One(20, 12), ["fc"]),
    "linear-square": Kind(lambda: One(12, 12), ["fc"]),
    "linear-r-not-dividing": Kind(lambda: One(12, 22), ["fc"], rank=5),
    "linear-nr>D": Kind(lambda: One(12, 13), ["fc"], rank=5),  # 3 bases of rank 5: 15 columns, 13 rows
    "conv1d": Kind(lambda: OneConv1D(12, 20), ["fc"]),
    "conv1d-q-and-v": Kind(lambda: OneConv1D(12, 36, "c_attn"), ["q", "v"]),
    "grouped-query": Kind(FewHeads, ["k", "q"]),
    "mha-packed": Kind(lambda: SelfAttention(12), ["qkv"], rank=5),
    "mha-split": Kind(lambda: SelfAttention(12), ["qkv"], rank=5, qkv="split"),
    "mha-only-v": Kind(lambda: SelfAttention(12), ["v"]),
    "mha-out_proj": Kind(lambda: SelfAttention(12), ["o"], rank=5),
    "mha-qkvo": Kind(lambda: SelfAttention(12), ["attn"], rank=5),
    "timm-packed": Kind(lambda: TimmAttention(12), ["qkv"], rank=5),
    "conv2d": Kind(
        lambda: Convolution(12, 16, kernel_size=3, stride=(2, 1), groups=4, padding_mode="circular", padding=1),
        ["sums"],
        rank=3,
    ),
    "timm-split": Kind(lambda: TimmAttention(12), ["qkv"], rank=5, qkv="split"),
}


def adapter_of(method: str, kind: str) -> Adapter:
    return METHODS[method](KINDS[kind].rank, KINDS[kind].qkv)


def adapt(model: nn.Module, method: str, kind: str) -> InjectionReport:
    """Injects a method into a model of this kind."""
    return inject(model, adapter_of(method, kind), None if method in WHOLE else KINDS[kind].targets)


def base_and_adapted(method: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A plain model, and the same one with an adapter, freshly initialised."""
    model = KINDS[kind].build().to(dtype)
    plain = KINDS[kind].build().to(dtype)
    plain.load_state_dict(model.state_dict())
    adapt(model, method, kind)
    return plain, model


@torch.no_grad()
def randomise(model: nn.Module, std: float = 0.2) -> None:
    """Gives every trainable tensor values that matter: no factor of an update is left at zero."""
    for parameter in trainable_parameters(model).values():
        parameter.add_(std * torch.randn_like(parameter))
    for name, buffer in update_buffers(model).items():
        if name.endswith((".v", ".lead")):  # AutoLoRA's selection variables, RandLoRA's leading columns
            buffer.add_(torch.randn_like(buffer))


def trained(method: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A plain model, and the same one with an adapter whose tensors are random."""
    plain, model = base_and_adapted(method, kind, dtype)
    randomise(model)
    return plain, model


def inputs(model: nn.Module, batch: int = 3, length: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """(batch, length, features)."""
    return torch.randn(batch, length, int(model.features), dtype=dtype)  # type: ignore[arg-type]


def optimizer_steps(model: nn.Module, count: int) -> dict[str, bool]:
    """Some AdamW steps; says of every trainable tensor whether it has had a gradient other than zero."""
    parameters = trainable_parameters(model)
    moved = dict.fromkeys(parameters, False)
    if not parameters:
        return moved
    optimizer = make_optimizer(model, lr=0.01, weight_decay=0.1)
    for _ in range(count):
        x = inputs(model)
        optimizer.zero_grad()
        (model(x) - x.sum(-1, keepdim=True)).square().mean().backward()
        for name, parameter in parameters.items():
            moved[name] |= parameter.grad is not None and bool(parameter.grad.any())
        optimizer.step()
    return moved


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    difference = (actual - expected).abs().max().item()
    limit = relative * expected.abs().max().item()
    assert difference <= limit, f"largest difference {difference:.2e}, limit {limit:.2e}"


def large_tensors_kept(model: One) -> int:
    """How many tensors of the weight's size, besides the weight, a training pass keeps."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.extend([tensor] * (tensor.data_ptr() != model.fc.weight.data_ptr() and tensor.numel() == 40 * 30))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(3, 40, requires_grad=True))
    output.sum().backward()
    return len(kept)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda config: None) -> None:
    """Change a config by hand, so without its checksums."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop("sha256", None)
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder by hand."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    edit(folder)


def bases_of(model: nn.Module) -> list[Bases]:
    """The distinct modules of random bases."""
    return [module for module in model.modules() if isinstance(module, Bases)]
