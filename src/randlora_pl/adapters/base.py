"""Base classes of all methods: `Adapter` (options of a method) and `DeltaWeight` (trainable update of a weight).

An adapter is independent of the model. For each adapted weight it creates one `DeltaWeight`, whose `change` is the
definition and whose `add` is the fast path; their results must agree. A method can also have a `Procedure`, its actions
between optimizer steps, and a `PeftForm`, its form in PEFT's files.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.described import Described
from randlora_pl.adapters.kernels.common import added, builds, built_again, dropped
from randlora_pl.adapters.random_bases import Bases, Number, WeightShape, matches
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.options import Count, Probability

PeftFile = tuple[dict[str, Any], dict[str, Tensor]]
"""Keys of PEFT's config, and tensors by the base model's names."""

Layers = dict[str, dict[str, Tensor]]
"""Tensors of each layer by name."""


@dataclass(frozen=True)
class PeftForm:
    """Form of a method in PEFT's files: the method declares it and converts itself, `interop.peft` has the files.

    Attributes:
        name: PEFT's ``peft_type``.
        keys: Keys of PEFT's config that the import reads, or whose value changes nothing.
        tensors: PEFT's tensors of a layer.
        shared: PEFT's tensors of all layers together.
        least_rank: Smallest ``r``; None if the method checks its ranks itself.
        kernels: Factors A and B that PEFT has for convolutions, too, as four-dimensional tensors.
        convolutions: True if PEFT's updates of convolutions can be imported.
        packed: True if weights of ``nn.MultiheadAttention`` and blocks of packed weights have a form.
        starts: Values of ``init_lora_weights``, besides true and false, that have no effect after the training.
        when: Condition on PEFT's config, if methods share the ``peft_type``; the one without it gets the others.
    """

    name: str
    keys: frozenset[str]
    tensors: tuple[str, ...]
    shared: tuple[str, ...] = ()
    least_rank: int | None = 1
    kernels: tuple[str, str] | None = None
    convolutions: bool = False
    packed: bool = False
    starts: tuple[str, ...] = ("gaussian", "orthogonal", "eva", "mica")
    when: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True)
class Part:
    """Adapted weight of a file, with its trained tensors by the update's own names, float32.

    ``path`` is the module that owns the weight, ``block`` the block of a packed weight (q, k or v), if any, and
    ``packed`` is True for the packed weight of ``nn.MultiheadAttention``.
    """

    shape: WeightShape
    path: str
    block: str | None
    packed: bool
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class PeftContent:
    """Content of a PEFT adapter for its method.

    Attributes:
        source: Path of the adapter, for messages.
        config: PEFT's config.
        layers: PEFT's tensors of each layer, by our names of the layers.
        shapes: Shapes of the layers.
        names: PEFT's names of the layers in its patterns.
        transposed: Layers whose module stores its weight as (in, out).
        shared: The two tensors of `PeftForm.shared`; None if PEFT has not stored them.
        dtype: Dtype in which PEFT drew them.
    """

    source: str
    config: dict[str, Any]
    layers: Layers
    shapes: dict[str, WeightShape]
    names: dict[str, str]
    transposed: frozenset[str] = frozenset()
    shared: tuple[Tensor, Tensor] | None = None
    dtype: torch.dtype = torch.bfloat16

    def number(self, name: str, default: Number) -> Number:
        """Return a number of the config, in the type of its default.

        Raises:
            UserError: The value is not a finite number.
        """
        value = self.config.get(name)
        try:
            number = default if value is None else type(default)(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{self.source}: {name} is {brief(value)} in its config; copy it again.") from None


def append_zeros(tensor: Tensor, rows: int) -> Tensor:
    """Append rows of zeros, for what only PEFT has."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def peft_number(value: float) -> float:
    """Return a whole number as int, which PEFT's configs require."""
    return int(value) if value == int(value) else value


class Procedure:
    """Actions of a method between optimizer steps, such as pruning ranks; the base class does nothing.

    Tasks call a model's procedure themselves and store its state in checkpoints. In a training loop of one's own, call
    it:

        procedure = inject(model, adapter).procedure
        procedure.start(model)
        for step in range(steps):
            penalty = procedure.penalty()
            loss = own_loss() if penalty is None else own_loss() + penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            procedure.after_step(step, steps)

    Keep the updates that `Adapter.procedure` finds in the model rather than the model itself, whose report holds the
    procedure. Put what the result depends on into buffers that `DeltaWeight.kept` names, not into the state.

    Attributes:
        ran: True once `after_step` was called, or the values came from a file or a checkpoint.
    """

    ran = False

    def start(self, model: nn.Module) -> None:
        """Prepare the state of a new run, on the model's device; a resumed run then loads its own state."""

    def penalty(self) -> Tensor | None:
        """Return a term of the loss of an optimizer step, a scalar, or None.

        With several micro-batches, add it to the last one's loss only, times their number if the loss is divided by it.
        """
        return None

    def after_step(self, step: int, total: int) -> None:
        """Act right after an optimizer step, while its gradients are there; call this method of the base class, too.

        Args:
            step: Optimizer steps that were finished before this one, from 0.
            total: Optimizer steps of the whole run.
        """
        self.ran = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the model: tensors, and values of plain Python."""
        return {}

    def state_size(self) -> int:
        """Return the numbers in the tensors of `state_dict` after `start`, for the expected size of a checkpoint."""
        return 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`, after `start`; its tensors may be on another device."""

    def finish(self) -> dict[str, Any]:
        """Return facts of the training for ``results.json``, JSON values by flat key."""
        return {}


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return True, as a scalar tensor on their device, if all tensors (at least one) are finite; the host is idle."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors if tensor is not None]).all()


UNLIMITED = 1 << 31
"""Largest size for `Adapter.sizes` of methods without a limit."""

Rank = Count | dict[str, Count]
"""A positive whole number, or numbers by pattern of layer names."""


class DeltaWeight(nn.Module):
    """Trainable update of one weight.

    Args:
        dropout: Dropout probability on the input of the adapter's path, not of the frozen path:
            ``x @ W0.T + drop(x) @ delta.T``.

    Attributes:
        keep: If True, a layer may keep a matrix of its weight's size for the backward pass; if False, it avoids that
            if possible; None leaves the choice to the method.
        kept: Names of persistent buffers without a gradient that belong to the result, such as a mask. Files and
            checkpoints store them like the trained tensors.
        indexes: Buffers that are distinct and ascending places in a flat tensor, with the number of its entries. A file
            with other places raises an error.
        fixed: False if the update depends on the layer's input, so no matrix contains it: `contribution` is the
            definition then, and `change` raises an error.
        uses_weight: False if `change` has no use for W0, which a quantized layer then does not unpack.
        rebuilds: True if the backward pass builds W0 + delta again, unless ``keep`` is True: it costs less than to keep
            the matrix.
        rates: Factors of the learning rate by the name of a trained tensor, or of an update inside this one, all of
            whose tensors it multiplies; 1 for others. See `operations.rates_of`.
        heads: Number of parts that gates weight for each token; 0 for an update without gates.
        listener: Function that gets all gates of the layer, (..., heads), at each use, or None.
        undecayed: Names of trained tensors without weight decay, which would change the model by itself: they start at
            values of the frozen weight. See `operations.undecayed`.
    """

    keep: bool | None = None
    kept: tuple[str, ...] = ()
    indexes: Mapping[str, int] = {}
    fixed: bool = True
    uses_weight: bool = True
    rebuilds: bool = False
    heads: int = 0
    listener: Callable[[Tensor], None] | None = None
    rates: Mapping[str, float] = {}
    undecayed: tuple[str, ...] = ()

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def change(self, weight: Tensor) -> Tensor:
        """Return the update of a frozen weight, (out, in), which is added to it: the definition of the method."""
        name = type(self).__name__
        if self.fixed:
            raise UserError(f"{name} does not define change(weight), the matrix that is added to the weight.")
        raise no_matrix("a matrix of it", name.removesuffix("Delta"))

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return the adapted weight (out, in): the frozen one and `change`, summed without loss of small updates."""
        return added(weight, self.change(weight))

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply ``F.linear`` with the effective weight, (..., in) to (..., out)."""
        if not self.fixed or self.drops:
            return F.linear(x, weight, bias) + self.contribution(x, lambda: weight)
        if self.rebuilds and not self.keep:
            return built_again(x, lambda: self.effective_weight(weight), bias)
        return F.linear(x, self.effective_weight(weight), bias)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the update's part of the outputs, ``drop(x) @ change(W0).T``, (..., in) to (..., out).

        Args:
            x: Input of the layer.
            weight: Function that returns W0 (out, in), which can be expensive.
        """
        if not self.fixed:
            raise UserError(f"{type(self).__name__} does not define contribution(x, weight), its part of the outputs.")
        return F.linear(self.dropped(x), like(self.change(weight() if self.uses_weight else x.new_empty(0)), x))

    def apart(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], groups: int) -> Tensor:
        """Return the update's part of a convolution's outputs, ``product(drop(x), change(W0))``.

        Args:
            x: Input of the layer, (..., channels, height, width).
            weight: W0, (out, in / groups * height * width).
            product: Function that convolves inputs with a matrix of this width.
            groups: Groups of channels, each of which gets as many rows of the matrix.
        """
        return product(self.dropped(x), self.change(weight))

    @property
    def drops(self) -> bool:
        """True if dropout is active, so that the two paths have different inputs."""
        return self.dropout > 0 and self.training

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input of the adapter's path, with dropout if it is active."""
        return dropped(x, self.dropout) if self.drops else x

    def extra_repr(self) -> str:
        """Return the names and shapes of the trainable tensors."""
        return ", ".join(f"{name}={tuple(value.shape)}" for name, value in self.named_parameters(recurse=False))


def no_matrix(operation: str, name: str) -> UserError:
    """Return the error for an operation, such as ``the export to ONNX``, on an update that depends on the input.

    The name is the method's, or a layer's or file's with the method in brackets.
    """
    return UserError(
        f"{name}: the update depends on the input and no weight contains it, so {operation} is not possible. Use the "
        "adapter itself: predict, serve and, for images, adapter export --to torch run it unmerged."
    )


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return ``tensor`` in the dtype of ``x``, so that float32 adapters work in bfloat16 models without autocast."""
    return tensor.to(x.dtype)


def plus_product(plain: Tensor, hidden: Tensor, p: Tensor) -> Tensor:
    """Return ``plain + hidden @ p.T``, (..., out), with one pass over the outputs, for P (out, k)."""
    rows = plain.reshape(-1, plain.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    return torch.addmm(*rows, like(p, hidden).T).view(plain.shape)


class FactoredDelta(DeltaWeight):
    """Update P Q with P (out, k) and Q (k, in), applied as two thin products if they are cheaper than W0 + P Q."""

    trains_factors = False  # True if P and Q themselves train

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return P (out, k), which includes the scaling, and Q (k, in)."""
        raise UserError(f"{type(self).__name__} does not define factors(), which returns P and Q of the update.")

    def change(self, weight: Tensor) -> Tensor:
        """Return P Q, (out, in)."""
        p, q = self.factors()
        return p @ q

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Add the two thin products to the frozen layer's output, or build W0 + P Q if that takes fewer operations."""
        p, q = self.factors()
        may_build = self.keep is not False and not self.drops
        if may_build and builds(x.numel() // x.shape[-1], q.shape[0], weight, p.requires_grad):
            return F.linear(x, added(weight, p @ q), bias)
        hidden = F.linear(self.dropped(x), like(q, x))
        return plus_product(F.linear(x, weight, bias), hidden, p)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the two thin products, (..., in) to (..., out)."""
        p, q = self.factors()
        hidden = F.linear(self.dropped(x), like(q, x))
        return F.linear(hidden, like(p, hidden))


class Adapter(Described):
    """Method and its options, as in a config.

    A method declares its own options as fields. Options of every method that it does not have are fields with
    ``init=False``.
    """

    dropout: Annotated[float, Probability] = 0.0
    """Dropout on the input of the adapter's path."""
    qkv: Literal["packed", "split"] = "packed"
    """Adaptation of packed query/key/value weights: ``packed`` as one 3d x d matrix (the paper), ``split`` as three
    d x d matrices (exports to models with separate projections)."""
    match: str | None = None
    """Other method whose trainable parameters to match by choosing the rank, or what sets the size instead
    (`size_option`), for example ``lora:32``; both counts are printed. Refused if the nearest count is more than half
    off."""
    seed: int | None = None
    """Seed of the random bases and initial values. Default: the run's seed."""

    learning_rates: ClassVar[tuple[float, float, float] | None] = None
    """Default learning rates: both towers of a CLIP, an image tower alone, a language model. None: the parts have some,
    or a run must set one."""
    peft: ClassVar[PeftForm | None] = None
    """Form in PEFT's files, for `to_peft` and `from_peft`."""
    group = "fixed rank"  # rank of the update, or what else it is: the heading of the method in listings
    size_option = "rank"  # the option that ``match`` chooses from `sizes`, if the method has it
    rate_option = "learning_rate"  # the option of tasks on images that has its rate
    updates = True  # False if nothing of the model changes
    own_optimizer = False  # True if the method has an optimizer of its own
    trains_base = False  # True if the method trains the model's own tensors instead of adding to them
    keeps_base = True  # False if the model's own tensors change
    freezes = True  # False if the method trains whole weights of layers
    reads_weight = False  # True if an update depends on the values of the frozen weight, at its start or always
    holds_factors = False  # True if an update holds frozen factors as large as its weight
    trains_factors = False  # True if an update has two thin factors and trains both as they are, see `FactoredDelta`
    fixed = True  # False if an update depends on the input, see `DeltaWeight`
    proportional_to: ClassVar[tuple[str, ...]] = ()  # trained tensors whose multiple by s is s times the update
    exports_factors = False  # True if PEFT gets the LoRA of the updates' factors, which needs the base model

    @property
    def key(self) -> int:
        """Seed, or 0 if it is None."""
        return self.seed or 0

    def require_matrix(self, operation: str, source: object = "") -> None:
        """Refuse an operation that needs the matrix of an update, if the update depends on the input.

        Args:
            operation: The operation as a noun, such as ``the merge``.
            source: File or layer for the message.

        Raises:
            UserError: The update depends on the input, see `DeltaWeight.fixed`.
        """
        if not self.fixed:
            raise no_matrix(operation, f"{source} ({self.method()})" if source else self.method())

    def value(self, option: str, shape: WeightShape) -> Any:
        """Return an option's value for a layer, of its first matching pattern or the default if it has patterns.

        Raises:
            UserError: No pattern matches, and the option has no default.
        """
        given = getattr(self, option)
        if not isinstance(given, dict):
            return given
        own = next(each for each in fields(self) if each.name == option)
        default = own.default if own.default_factory is MISSING else own.default_factory()
        own_value = next((value for pattern, value in given.items() if matches(pattern, shape.layer)), default)
        if own_value is MISSING or isinstance(own_value, dict):
            raise UserError(f"{self.method()}: no pattern of {option} matches {shape.layer}.")
        return own_value

    def largest_rank(self, shape: WeightShape) -> int:
        """Return the largest rank for one layer, by default its smaller side."""
        return shape.small

    def rank_of(self, shape: WeightShape) -> int:
        """Return the rank for one layer, if the method has the option ``rank``.

        Raises:
            UserError: The rank is larger than `largest_rank`.
        """
        rank: int = self.value("rank", shape)
        if rank > (most := self.largest_rank(shape)):
            raise UserError(
                f"{self.method()}: rank {rank} is larger than the smaller side {shape.small} of {shape.layer} "
                f"({shape.out_features} x {shape.in_features}); choose a rank up to {most}, or leave "
                "this layer out of the targets."
            )
        return rank

    def scaling_of(self, shape: WeightShape) -> float:
        """Return alpha / r for one layer, if the method has these options; 1 without an alpha."""
        alpha = self.value("alpha", shape)
        return 1.0 if alpha is None else float(alpha) / self.rank_of(shape)

    @abstractmethod
    def count(self, shape: WeightShape) -> int:
        """Return the number of trainable parameters for one weight."""

    def sizes(self, shapes: Sequence[WeightShape]) -> Sequence[int]:
        """Return the values that ``match`` may give to the `size_option` on these weights, ascending.

        By default a rank is at most each weight's `largest_rank`, and other sizes have no limit. Sizes that `count`
        refuses are left out. If there are more than 10,000, the count must not decrease with the size.
        """
        top = max(1, min(map(self.largest_rank, shapes))) if self.size_option == "rank" else UNLIMITED
        return range(1, top + 1)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """Return the random tensors that all layers share, at the largest required size, or None."""
        return None

    @abstractmethod
    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> DeltaWeight:
        """Create the update of one weight, zero at the start; the frozen ``weight`` gives dtype and device."""

    def procedure(self, model: nn.Module) -> Procedure | None:
        """Return what the method does between optimizer steps on a model with its updates, or None for nothing."""
        return None

    def optimizer(self, model: nn.Module, groups: Any, **options: Any) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters in ``groups``; AdamW, if the method has no optimizer of its own."""
        return torch.optim.AdamW(groups, **options)

    def optimizer_numbers(self, model: nn.Module) -> int:
        """Return the numbers in the optimizer's state for an adapted model; AdamW stores two per trained number."""
        return 2 * sum(each.numel() for each in model.parameters() if each.requires_grad)

    def peft_problem(self) -> str:
        """Return the reason that PEFT cannot have this method, or ""."""
        known = self.peft is not None or self.exports_factors or type(self).in_peft is not Adapter.in_peft
        return "" if known else "PEFT does not have this method"

    def in_peft(self, parts: list[Part]) -> tuple["Adapter", list[Part]]:
        """Return the method and its adapted weights whose form PEFT's file gets; by default the method itself."""
        return self, parts

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert adapted weights to PEFT's form; ``peft_type`` and ``target_modules`` are added to the config.

        Raises:
            UserError: PEFT cannot represent them; the message is the reason.
        """
        raise NotImplementedError

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple["Adapter", Layers, Bases | None]:
        """Convert PEFT's form to a method, its tensors by layer, and its bases, if PEFT's differ from ours.

        Raises:
            UserError: The content is damaged, or no method here has the same outputs.
        """
        raise NotImplementedError
