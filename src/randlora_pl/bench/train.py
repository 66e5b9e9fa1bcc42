"""Whole training steps of a vision model: full fine-tuning, our methods and PEFT's, from random weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.bench.flops import Gemm, counter
from randlora_pl.bench.memory import OUT_OF_MEMORY, is_out_of_memory
from randlora_pl.bench.methods import METHODS, Targets, UnavailableError, adapted, label, layers_of
from randlora_pl.bench.steps import Case, Measured, Precision
from randlora_pl.errors import UserError, near

CLASSES = 100
Library = Literal["timm", "open_clip"]


@dataclass(frozen=True)
class Setup:
    """What is trained, how and where; can be sent to another process.

    Attributes:
        model: A name of the library; the image tower of an open_clip model.
        library: Which library builds it.
        batch_size: Images of a step.
        precision: ``32``, ``bf16`` for autocast, or ``bf16-frozen`` with frozen matrices in bfloat16 as well.
        device: ``cpu`` or ``cuda``.
        threads: Threads of PyTorch, 0 for its own choice.
        targets: The layers that adapters attach to; None for the paper's choice.
    """

    model: str
    library: Library
    batch_size: int
    precision: Precision = "32"
    device: str = "cpu"
    threads: int = 0
    targets: Targets = None


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of the products."""
    return torch.float32 if precision == "32" else torch.bfloat16


def library_of(model: str) -> Library:
    """The library that knows a model; both may, timm then comes first.

    Raises:
        UserError: Neither does; near names are suggested.
    """
    import open_clip
    import timm

    known: dict[Library, list[str]] = {"timm": timm.list_models(), "open_clip": ["tiny", *open_clip.list_models()]}
    for library, names in known.items():
        if (model.partition(".")[0] if library == "timm" else model) in names:
            return library
    names = [name for names in known.values() for name in names]
    raise UserError(f"--model: neither timm nor open_clip has a model '{model}'.{near(model, names)}")


def build(setup: Setup) -> tuple[nn.Module, int, int]:
    """The plain model with random weights on the CPU, the size of its images, the length of its features.

    Raises:
        UserError: The library does not know the model.
    """
    if (found := library_of(setup.model)) != setup.library:
        raise UserError(f"--library {setup.library} has no model '{setup.model}'; --library {found} has one.")
    if setup.library == "timm":
        from randlora_pl.models.vit import load_vit

        vit = load_vit(setup.model, "random")
        return vit.model, vit.image.size, vit.num_features
    from randlora_pl.models.clip import ImageTower, load_clip

    clip = load_clip(setup.model, "random")
    return ImageTower(clip.model), clip.image.size, clip.embed_dim


class Training:
    """The plain model and a batch of random images, from which each method makes its case.

    Features are classified by a frozen matrix, as against a head of text embeddings, so that methods differ
    in the model alone.

    Args:
        setup: What to train, how and where.

    Raises:
        UserError: The library does not know the model, or there is no layer to adapt.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.device = torch.device(setup.device)
        self.base, self.size, features = build(setup)
        self.layers = layers_of(self.base, setup.targets)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(setup.batch_size, 3, self.size, self.size, generator=generator)
        labels = torch.randint(CLASSES, (setup.batch_size,), generator=generator)
        head = torch.randn(CLASSES, features, generator=generator) / features**0.5
        self.images, self.labels, self.head = (tensor.to(self.device) for tensor in (images, labels, head))

    def loss(self, model: nn.Module) -> Tensor:
        """Cross-entropy of the images."""
        return F.cross_entropy(F.linear(model(self.images), self.head).float(), self.labels)

    def case(self, name: str) -> Case:
        """One method, ready to be measured.

        Raises:
            UnavailableError: It cannot be had here; says why.
        """
        try:
            model = adapted(self.base, name, targets=self.setup.targets).train()
        except Exception as error:
            if is_out_of_memory(error):
                raise UnavailableError(OUT_OF_MEMORY) from error
            raise
        return Case(
            name, label(name), model, self.loss, [self.images, self.labels, self.head],
            device=self.device, precision=self.setup.precision, foreign=METHODS[name].foreign,
        )  # fmt: skip

    def cases(self, names: Sequence[str]) -> tuple[list[Case], list[Measured]]:
        """The methods that can be measured, and why the others cannot."""
        cases, missing = [], []
        for name in names:
            try:
                cases.append(self.case(name))
            except UnavailableError as reason:
                missing.append(Measured(name, label(name), str(reason)))
        return cases, missing

    def gemm(self) -> Gemm:
        """The machine's peak in the precision of the products."""
        return Gemm(self.device, dtype_of(self.setup.precision))

    @torch.no_grad()
    def forward_flops(self) -> int:
        """Operations of a forward pass of the plain model, counted on one image."""
        with counter() as operations:
            self.base(self.images[:1].cpu())
        return int(operations.get_total_flops()) * self.setup.batch_size


def estimated_seconds(forward: int, rate: float, cases: int, rounds: int) -> float:
    """Roughly how long a run takes: a step has three forward passes at half of the machine's peak, a model is built.

    Args:
        forward: Operations of a forward pass.
        rate: Operations a second of the machine at best.
        cases: How many are measured.
        rounds: Steps of each, beside the one that is counted.
    """
    return cases * (3 * forward / (0.5 * rate) * (rounds + 1) + 0.5 * rounds + 2)


def one_training(setup: Setup, name: str) -> None:
    """Two steps of one method, for a process whose memory is measured."""
    if setup.threads:
        torch.set_num_threads(setup.threads)
    if find_spec("peft"):  # its size is not that of a method
        import_module("peft")
    training = Training(setup)
    case = training.case(name)
    training.base = nn.Identity()  # full fine-tuning has a copy
    case.step()
    case.step()
