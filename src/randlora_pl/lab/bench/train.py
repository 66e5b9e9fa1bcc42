"""Whole training steps of a model: full fine-tuning, our methods and PEFT's, from random weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from randlora_pl.lab.bench.flops import Gemm, counter
from randlora_pl.lab.bench.methods import METHODS, Targets, adapted, label, language_rank, layers_of
from randlora_pl.lab.bench.problems import Library, image_problem, library_of, token_problem
from randlora_pl.lab.bench.steps import Case, Measured, Precision, available
from randlora_pl.utils.errors import UserError


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
            self.problem = token_problem(setup.model, setup.batch_size, setup.tokens, setup.overrides)
        else:
            self.problem = image_problem(setup.model, setup.library, setup.batch_size)
        self.base = self.problem.model
        self.layers = layers_of(self.base, setup.targets)
        self.batch = [tensor.to(self.device) for tensor in self.problem.batch]

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the batch."""
        return self.problem.loss(model, self.batch)

    def rank(self, name: str) -> int | None:
        """Return a method's rank for this kind of model; None for its own."""
        return (language_rank(name) or None) if self.problem.decoder else None

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
            self.base(self.problem.batch[0][:1])
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
    training.problem = replace(training.problem, model=nn.Identity())
    case.step()
    case.step()
