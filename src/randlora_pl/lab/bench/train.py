"""Whole training steps of a model: full fine-tuning, our methods and PEFT's, from random weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.lab.bench.costs import Gemm, counter
from randlora_pl.lab.bench.methods import LANGUAGE_RANKS, METHODS, Targets, adapted, label, layers_of
from randlora_pl.lab.bench.steps import Case, Measured, Precision, available
from randlora_pl.utils.errors import UserError, near

CLASSES = 100
Library = Literal["timm", "open_clip", "transformers"]
Problem = tuple[nn.Module, list[Tensor], Callable[[nn.Module, Sequence[Tensor]], Tensor], str]
"""A plain model; samples and all other inputs of the loss, each sample a row of the first one; the loss; what they are.

Model and inputs are on the CPU.
"""


def library_of(model: str) -> Library:
    """Return the library that has a model, timm before open_clip; a UserError suggests near names for others."""
    import open_clip
    import timm

    from randlora_pl.language.catalog import KNOWN

    known: dict[Library, list[str]] = {
        "timm": timm.list_models(),
        "open_clip": ["tiny", *open_clip.list_models()],
        "transformers": [name for name, each in KNOWN.items() if each.kind != "roberta"],
    }
    for library, names in known.items():
        if (model.partition(".")[0] if library == "timm" else model) in names:
            return library
    names = [name for names in known.values() for name in names]
    raise UserError(
        f"--model: neither timm nor open_clip has a model '{model}', and it is none of the known decoders "
        f"({', '.join(known['transformers'])}).{near(model, names)}"
    )


def image_problem(model: str, library: Library, images: int) -> Problem:
    """Return a vision model whose features are classified by a frozen matrix, like with a head of text embeddings.

    Methods so differ in the model alone.
    """
    built: nn.Module
    if library == "timm":
        from randlora_pl.models.vit import load_vit

        vit = load_vit(model, "random")
        built, size, features = vit.model, vit.image.size, vit.num_features
    else:
        from randlora_pl.models.clip import ImageTower, load_clip

        clip = load_clip(model, "random")
        built, size, features = ImageTower(clip.model), clip.image.size, clip.embed_dim

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        images, labels, head = batch
        return F.cross_entropy(F.linear(model(images), head).float(), labels)

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    head = torch.randn(CLASSES, features, generator=generator) / features**0.5
    return built, [pixels, labels, head], loss, f"{images} images of {size} pixels"


def token_problem(model: str, samples: int, tokens: int, overrides: Mapping[str, Any] | None) -> Problem:
    """Return a decoder, known by name, that predicts each next one of the random tokens of some samples.

    Raises:
        UserError: transformers is missing, the options make no model, or it has fewer positions than tokens.
    """
    from randlora_pl.language.loading import RANDOM, model_config, possible, try_out
    from randlora_pl.language.token_losses import table_of_positions, token_losses
    from randlora_pl.models.weights import seeded

    if tokens < 2:
        raise UserError(f"--tokens is {tokens}: give two or more, each is predicted from those before it")
    config = model_config(model, RANDOM, overrides, "--overrides")
    from transformers import AutoModelForCausalLM

    if config.vocab_size < 2:
        raise UserError(f"--overrides: a decoder with vocab_size {config.vocab_size} has nothing to choose from")
    with seeded(0), possible(overrides, "--overrides", config):
        built = AutoModelForCausalLM.from_config(config)
        if overrides:
            try_out(built)
    if (most := table_of_positions(built)) and tokens > most:
        raise UserError(f"--tokens is {tokens}, and {config.model_type} has {most:,} positions: give no more")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (samples, tokens), generator=generator)

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        (ids,) = batch
        learned = torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten()
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "learned": learned}
        return token_losses(model, {**texts, "padding": "right"})[0].mean()

    return built, [ids], loss, f"{samples} samples of {tokens} tokens"


@dataclass(frozen=True)
class Setup:
    """Setup of a training; can be sent to another process.

    Attributes:
        model: A name of the library; the image tower of an open_clip model.
        batch_size: Images of a step, or samples of text.
        threads: Threads of PyTorch, 0 for its own choice.
        targets: The layers that adapters attach to; None for the paper's choice.
        dropout: On the input of the updates' paths.
    """

    model: str
    library: Library
    batch_size: int
    precision: Precision = "32"
    device: str = "cpu"
    threads: int = 0
    targets: Targets = None
    tokens: int = 256
    overrides: dict[str, int] | None = None
    dropout: float = 0.0


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of the products."""
    return torch.float32 if precision == "32" else torch.bfloat16


class Training:
    """The plain model and a batch of random samples, from which each method makes its case.

    Raises:
        UserError: The library does not have the model, or the model has no layer to adapt.
    """

    def __init__(self, setup: Setup) -> None:
        if (found := library_of(setup.model)) != setup.library:
            raise UserError(f"--library {setup.library} has no model '{setup.model}'; --library {found} has one.")
        self.setup = setup
        self.device = torch.device(setup.device)
        if setup.library == "transformers":
            problem = token_problem(setup.model, setup.batch_size, setup.tokens, setup.overrides)
        else:
            problem = image_problem(setup.model, setup.library, setup.batch_size)
        self.base, (self.samples, *others), loss, self.words = problem
        self.layers = layers_of(self.base, setup.targets)
        self.batch = [tensor.to(self.device) for tensor in (self.samples, *others)]
        self.loss = lambda model: loss(model, self.batch)

    def rank(self, name: str) -> int | None:
        """Return a method's rank for this kind of model; None for its own."""
        kind = name.removeprefix("peft-").partition("-")[0]
        return LANGUAGE_RANKS.get(kind) if self.setup.library == "transformers" else None

    def label(self, name: str) -> str:
        """Return a method's name in tables."""
        return label(name, self.rank(name))

    def case(self, name: str) -> Case:
        """Return one method, ready to be measured.

        Raises:
            UnavailableError: The method is not available here, with the reason.
        """
        model = adapted(self.base, name, self.rank(name), self.setup.targets, self.setup.dropout).train()
        return Case(
            name, self.label(name), model, self.loss, self.batch,
            device=self.device, precision=self.setup.precision, foreign=METHODS[name].foreign,
        )  # fmt: skip

    def cases(self, names: Sequence[str]) -> tuple[list[Case], list[Measured]]:
        """Return the methods that can be measured, and why the others cannot."""
        return available(names, self.case, self.label)

    def gemm(self) -> Gemm:
        """Return the machine's peak in the precision of the products."""
        return Gemm(self.device, dtype_of(self.setup.precision))

    @torch.no_grad()
    def forward_flops(self) -> int:
        """Return the operations of a forward pass of the plain model, counted on one sample."""
        with counter() as operations:
            self.base(self.samples[:1])
        return int(operations.get_total_flops()) * self.setup.batch_size


def estimated_seconds(forward: int, rate: float, cases: int, rounds: int) -> float:
    """Return roughly how long a run takes, from operations of a forward pass and the machine's peak a second.

    A step has three forward passes at half of the peak, and a model is built.
    """
    return cases * (3 * forward / (0.5 * rate) * (rounds + 1) + 0.5 * rounds + 2)


def one_training(setup: Setup, name: str) -> None:
    """Run two steps of one method, for a process whose memory is measured."""
    if setup.threads:
        torch.set_num_threads(setup.threads)
    if find_spec("peft"):  # its import does not count as a method's memory
        import_module("peft")
    training = Training(setup)
    case = training.case(name)
    training.base = nn.Identity()  # full fine-tuning has a copy
    case.step()
    case.step()
