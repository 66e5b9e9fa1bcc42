"""Training steps as things to measure: their seconds, and, outside the clock, their memory and operations.

Whole steps of a model start from random weights: full fine-tuning, our methods and PEFT's.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from randlora_pl.adapters.kernels.randlora_linear import end_step
from randlora_pl.lab import bench
from randlora_pl.models import cast_frozen, use_fast_layers
from randlora_pl.utils.errors import UserError, near, out_of_memory

Precision = Literal["32", "bf16", "bf16-frozen"]
"""``bf16`` is autocast; ``bf16-frozen`` has frozen matrices in bfloat16 as well."""
_LEAST = 0.4  # seconds of steps in one measurement, at least
_PEAK = "matrix product"


class Case:
    """A model that trains, measured step by step; on the device only while it is measured.

    A GPU so holds one case at a time, and its peak is the case's. A case that runs out of memory is
    dropped and reports it.

    Args:
        name: Name on the command line.
        label: Name in tables.
        model: On the CPU.
        loss: The forward pass: the model to a scalar.
        inputs: Tensors on the device that the forward pass reads. One that asks for a gradient stands for
            what layers below would give, and counts as kept for the backward pass; the others do not.
        device: Device of the measurement.
        optimize: Whether AdamW is part of the step.
        foreign: Whether its errors are reported instead of raised.
    """

    def __init__(
        self,
        name: str,
        label: str,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        inputs: Sequence[Tensor],
        *,
        device: torch.device,
        precision: Precision = "32",
        optimize: bool = True,
        foreign: bool = False,
    ) -> None:
        self.name, self.label, self.model, self.loss, self.inputs = name, label, model, loss, inputs
        self.device, self.precision, self.foreign = device, precision, foreign
        if precision == "bf16-frozen":
            cast_frozen(model, torch.bfloat16)
        use_fast_layers(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer: Optimizer | None = AdamW(trained, lr=1e-4, fused=True) if optimize else None
        self.saved = self.flops = 0
        self.peak: int | None = None
        self.problem = ""
        self._repeat = 1

    def step(self) -> None:
        """Forward pass, backward pass, optimizer, gradients dropped."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "32"):
            loss = self.loss(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
        else:
            end_step()  # else the next repetition would be a further micro-batch, which builds nothing
        self.model.zero_grad()
        for tensor in self.inputs:
            tensor.grad = None

    def count(self) -> None:
        """Run a first step to count memory and operations, and a second one for the time, and on a GPU the peak."""
        with self._guarded(), self._present():
            batch = [tensor for tensor in self.inputs if not tensor.requires_grad]
            outside = [*self.model.parameters(), *self.model.buffers(), *batch]
            start = time.perf_counter()
            with bench.saved_tensors(outside) as saved, bench.counter() as operations:
                self.step()
            self.saved, self.flops = sum(saved.values()), operations.get_total_flops()
            on_gpu = self.device.type == "cuda"
            if on_gpu or time.perf_counter() - start < 10 * _LEAST:  # not the time of a usual step
                bench.synchronize(self.device)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(self.device)
                start = time.perf_counter()
                self.step()
                bench.synchronize(self.device)
                self.peak = int(torch.cuda.max_memory_allocated(self.device)) if on_gpu else None
            self._repeat = max(1, round(_LEAST / (time.perf_counter() - start)))

    def seconds(self) -> float:
        """Return the seconds of a step, the mean of as many as fill some tenths of a second; NaN after a problem."""
        shortest = float("nan")
        if self.problem:
            return shortest
        with self._guarded(), self._present():
            if self.device.type == "cuda":  # the allocator starts again each time
                self.step()
                self.step()
            bench.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(self._repeat):
                self.step()
            bench.synchronize(self.device)
            shortest = (time.perf_counter() - start) / self._repeat
        return shortest  # noqa: RET504 (still NaN where a problem ended the block)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Note that the block ran out of memory, or any error of a foreign method, and drop the model then."""
        try:
            yield
        except Exception as error:
            if out_of_memory(error):
                self.problem = bench.OUT_OF_MEMORY
            elif self.foreign:
                self.problem = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            else:
                raise
        if self.problem:  # outside the except block, which holds the frames
            self.model, self.optimizer = nn.Identity(), None

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Hold the model and the optimizer's state on the device inside the block only."""
        if self.device.type == "cpu":
            yield
            return
        try:
            self._move(self.device)
            yield
        finally:
            self.model.zero_grad()
            self._move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        self.model.to(device)
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                state.update({key: value.to(device) for key, value in state.items() if isinstance(value, Tensor)})


@dataclass
class Measured:
    """Measurements of a case, or the reason for none.

    Attributes:
        trained: Parameters that train.
        saved: Bytes kept for the backward pass, without parameters, buffers and the batch.
        flops: Operations of a step.
        peak: On a GPU the allocator's peak in bytes.
        seconds: Seconds of a step, one value per round.
        rates: Operations a second of a large matrix product in the same rounds.
    """

    name: str
    label: str
    problem: str = ""
    trained: int = 0
    saved: int = 0
    flops: int = 0
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def spread(self) -> bench.Spread | None:
        """Return the spread of the seconds."""
        return bench.Spread.over(self.seconds) if self.seconds else None

    def ratio(self, base: "Measured | None") -> bench.Spread | None:
        """Return the seconds relative to another case, round by round."""
        return bench.ratios(self.seconds, base.seconds) if base and base.seconds and self.seconds else None

    def of_peak(self) -> float | None:
        """Return the operations per second, as the median fraction of the matrix product's in the same round."""
        fractions = [self.flops / one / rate for one, rate in zip(self.seconds, self.rates, strict=True)]
        return median(fractions) if fractions else None


def measure(
    cases: Sequence[Case],
    gemm: bench.Gemm,
    rounds: int,
    tick: Callable[[str], None] = lambda _: None,
    keep: Callable[[list[Measured]], None] = lambda _: None,
) -> list[Measured]:
    """Count each case once, then time all of them interleaved; the counted step is the one that warms up.

    Args:
        cases: Cases to measure.
        gemm: Matrix product, whose speed is also measured in each round.
        rounds: Measurements of each case.
        tick: Called with the name of the next measurement: each case once, and the product and each case once a round.
        keep: Given what is known after each round, so that an interruption loses little.
    """
    for case in cases:
        tick(case.name)
        case.count()
    turns: dict[str, Callable[[], float]] = {_PEAK: gemm.rate} | {case.name: case.seconds for case in cases}

    def collect(values: dict[str, list[float]]) -> list[Measured]:
        results = []
        for case in cases:
            one = Measured(case.name, case.label, case.problem)
            if not case.problem:
                one.trained, one.saved, one.flops, one.peak = case.trained, case.saved, case.flops, case.peak
                one.seconds, one.rates = list(values[case.name]), list(values[_PEAK])
            results.append(one)
        return results

    return collect(bench.in_turns(turns, rounds, tick, lambda values: keep(collect(values))))


def available(
    names: Sequence[str], case: Callable[[str], Case], label: Callable[[str], str]
) -> tuple[list[Case], list[Measured]]:
    """Return the methods that can be measured, and why the others cannot."""
    cases, missing = [], []
    for name in names:
        try:
            cases.append(case(name))
        except bench.UnavailableError as reason:
            missing.append(Measured(name, label(name), str(reason)))
    return cases, missing


def ticks(cases: int, rounds: int) -> int:
    """Return the number of `measure`'s calls of ``tick``."""
    return cases + rounds * (cases + 1)


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
        f"--model: neither timm nor open_clip has a model '{model}', and it is not one of the known decoders "
        f"({', '.join(known['transformers'])}).{near(model, names)}"
    )


def _image_problem(model: str, library: Library, images: int) -> Problem:
    """Return a vision model with a frozen matrix as classifier, so that methods differ in the model alone."""
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
        return nn.functional.cross_entropy(nn.functional.linear(model(images), head).float(), labels)

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    head = torch.randn(CLASSES, features, generator=generator) / features**0.5
    return built, [pixels, labels, head], loss, f"{images} images of {size} pixels"


def _token_problem(model: str, samples: int, tokens: int, overrides: Mapping[str, Any] | None) -> Problem:
    """Return a decoder, known by name, that predicts each next one of the random tokens of some samples."""
    from randlora_pl.language.decoder import table_of_positions, token_losses
    from randlora_pl.language.tokenization import RANDOM, model_config, possible, try_out
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
    """Setup of a training run.

    Attributes:
        model: A name of the library; the image tower of an open_clip model.
        batch_size: Images of a step, or samples of text.
        targets: The layers that adapters attach to; None for the paper's choice.
        dropout: On the input of the updates' paths.
    """

    model: str
    library: Library
    batch_size: int
    precision: Precision = "32"
    device: str = "cpu"
    targets: bench.Targets = None
    tokens: int = 256
    overrides: dict[str, int] | None = None
    dropout: float = 0.0


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of the products."""
    return torch.float32 if precision == "32" else torch.bfloat16


class Training:
    """The plain model and a batch of random samples, from which each method makes its case.

    Raises:
        UserError: The library or its extra is missing or does not have the model, the options make none, it has fewer
            positions than tokens, or it has no layer to adapt.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.device = torch.device(setup.device)
        if setup.library == "transformers":
            problem = _token_problem(setup.model, setup.batch_size, setup.tokens, setup.overrides)
        else:
            problem = _image_problem(setup.model, setup.library, setup.batch_size)
        self.base, inputs, loss, self.words = problem
        self.layers = bench.layers_of(self.base, setup.targets)
        self.batch = [tensor.to(self.device) for tensor in inputs]
        self.loss = lambda model: loss(model, self.batch)

    def rank(self, name: str) -> int | None:
        """Return a method's rank for this kind of model; None for its own."""
        kind = name.removeprefix("peft-").partition("-")[0]
        return bench.LANGUAGE_RANKS.get(kind) if self.setup.library == "transformers" else None

    def label(self, name: str) -> str:
        """Return a method's name in tables."""
        return bench.label(name, self.rank(name))

    def case(self, name: str) -> Case:
        """Return one method, ready to be measured.

        Raises:
            UnavailableError: The method is not available here, with the reason.
        """
        model = bench.adapted(self.base, name, self.rank(name), self.setup.targets, self.setup.dropout).train()
        return Case(
            name, self.label(name), model, self.loss, self.batch,
            device=self.device, precision=self.setup.precision, foreign=bench.METHODS[name].foreign,
        )  # fmt: skip

    def cases(self, names: Sequence[str]) -> tuple[list[Case], list[Measured]]:
        """Return the methods that can be measured, and why the others cannot."""
        return available(names, self.case, self.label)

    def gemm(self) -> bench.Gemm:
        """Return the machine's peak in the precision of the products."""
        return bench.Gemm(self.device, dtype_of(self.setup.precision))
