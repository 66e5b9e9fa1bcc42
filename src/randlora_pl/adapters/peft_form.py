"""Form of a method in PEFT's files: the method declares it and converts itself, `interop.peft` has the files."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora_pl.adapters.weights import Number, WeightShape
from randlora_pl.utils.errors import UserError, brief

Form = tuple[dict[str, Any], dict[str, Tensor]]
"""Keys of PEFT's config, and tensors by the base model's names."""

Layers = dict[str, dict[str, Tensor]]
"""Tensors of each layer by name."""


@dataclass(frozen=True)
class PeftForm:
    """Names of a method in PEFT's files.

    Attributes:
        name: PEFT's ``peft_type``.
        keys: Keys of PEFT's config that the import reads, or whose value changes nothing.
        tensors: PEFT's tensors of a layer.
        shared: PEFT's tensors of all layers together.
        least_rank: Smallest ``r``; None if the method checks its ranks itself.
        kernels: Factors A and B that PEFT has for convolutions, too, as four-dimensional tensors.
        convolutions: True if PEFT's updates of convolutions can be imported.
        packed: True if weights of ``nn.MultiheadAttention`` and blocks of packed weights have a form.
        starts: Values of ``init_lora_weights``, beside true and false, that have no effect after the training.
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


def filled(tensor: Tensor, rows: int) -> Tensor:
    """Append rows of zeros, for what only PEFT has."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def peft_number(value: float) -> float:
    """Return a whole number as int, which PEFT's configs require."""
    return int(value) if value == int(value) else value
