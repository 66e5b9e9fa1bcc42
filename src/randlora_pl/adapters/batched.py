"""Several adapters in one batch: a layer multiplies its frozen weight once, and adds to each sample its own update.

Thin factors, and sums of the same random bases, are applied to their samples together (`kernels.samples`). Any other
update, and each one of a convolution, is applied to the samples that have it by its own fast path.

A layer must find the rows of each sample in its input: windows may be folded into the batch, the batch may be the
second dimension, and the text tower of a classifier has none. So the first call of a model with inputs of a shape is
preceded by two of the base model, with one sample and with two. The dimension that grows contains the samples, and the
rows of the first sample stay in their places. An input for which this is not true raises an error.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from randlora_pl.adapters.base import DeltaWeight, FactoredDelta, like
from randlora_pl.adapters.kernels.common import compute_dtype
from randlora_pl.adapters.kernels.samples import Joint, add_factors
from randlora_pl.adapters.layers import RowBlocks, attach, has_own_forward
from randlora_pl.adapters.operations import detach
from randlora_pl.adapters.sites import reader_of, weight_of
from randlora_pl.utils.errors import UserError

Place = tuple[int, int]
"""Dimension of a layer's input that contains the samples, and the rows of each of them there."""

Places = dict[str, list[Place]]
"""Place of the samples at each use of a layer in a call of the model, by the layer's path."""


def joint_key(update: DeltaWeight) -> Hashable:
    """Return a key that is equal for updates of a layer that samples apply together, in one dtype; None for others."""
    if isinstance(update, Joint):
        return update.joint_key()
    return (FactoredDelta, *{each.dtype for each in update.parameters()}) if isinstance(update, FactoredDelta) else None


class PerSample(DeltaWeight):
    """Updates of a layer in one batch: one for each sample, or None for the frozen weight alone."""

    fixed = False

    def __init__(self, path: str, updates: Sequence[DeltaWeight | None], calls: "Calls", layer: nn.Module) -> None:
        super().__init__()
        self.path, self.calls, self.features = path, calls, len(weight_of(layer, values=False))
        self.alone: list[tuple[DeltaWeight | None, list[int]]] = []  # with their samples
        self.joint: dict[Hashable, tuple[slice, dict[int, DeltaWeight]]] = {}  # by sample, with the columns of outputs
        others: list[int] = []  # samples that need the frozen weight's product
        for update in dict.fromkeys(updates):
            rows = [row for row, each in enumerate(updates) if each is update]
            blocks = {} if update is None else {(0, self.features): update}
            if isinstance(update, RowBlocks):
                blocks = {update.rows[name]: block for name, block in update.blocks().items()}
            keys = [joint_key(block) for block in blocks.values()]
            if update is not None and (isinstance(layer, nn.Conv2d) or None in keys):
                self.alone.append((update, rows))
                continue
            others += rows
            for (columns, block), key in zip(blocks.items(), keys, strict=True):
                self.joint.setdefault((columns, key), (slice(*columns), {}))[1].update(dict.fromkeys(rows, block))
        parts = [*self.alone, (None, others)] if others else self.alone
        order = [row for _, rows in parts for row in rows]
        self.parts, self.order = parts, sorted(range(len(order)), key=order.__getitem__)

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the frozen weight and each sample's update, (..., in) to (..., out)."""

        def apply(update: DeltaWeight | None, x: Tensor) -> Tensor:
            return F.linear(x, weight, bias) if update is None else update.add(x, weight, bias)

        return self._outputs(x, 1, apply)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the part of each sample's update, (..., in) to (..., out)."""

        def apply(update: DeltaWeight | None, x: Tensor) -> Tensor:
            zeros = x.new_zeros(*x.shape[:-1], self.features, dtype=compute_dtype(x))
            return zeros if update is None else update.contribution(x, weight)

        return self._outputs(x, 1, apply)

    def apart(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], groups: int) -> Tensor:
        """Return the part of each sample's update in a convolution's outputs."""

        def apply(update: DeltaWeight | None, x: Tensor) -> Tensor:
            return product(x, 0 * weight) if update is None else update.apart(x, weight, product, groups)

        return self._outputs(x, 3, apply)

    def _outputs(self, x: Tensor, sizes: int, apply: Callable[[DeltaWeight | None, Tensor], Tensor]) -> Tensor:
        """Return the outputs for all samples; a row of the input has ``sizes`` dimensions."""
        if (place := self.calls.place(self.path, x)) is None:
            return apply(None, x)
        first = x.movedim(place[0], 0)
        samples = first.reshape(self.calls.count, -1, *x.shape[-sizes:])
        if len(self.parts) == 1:
            outputs = apply(None, samples)
        else:
            found = [apply(update, samples[rows].flatten(0, 1)) for update, rows in self.parts]
            split = [like(part, found[0]).reshape(-1, samples.shape[1], *part.shape[1:]) for part in found]
            outputs = torch.cat(split)[self.order]
        for columns, updates in self.joint.values():
            rows = sorted(updates)
            whole, own = len(rows) == len(samples), [updates[row] for row in rows]
            some, onto = (samples, outputs[..., columns]) if whole else (samples[rows], outputs[rows, :, columns])
            if isinstance(own[0], Joint):
                own[0].add_joint(own, some, onto)  # type: ignore[arg-type]  # all are of its kind, by their key
            else:
                factors = {each: each.factors() for each in dict.fromkeys(own) if isinstance(each, FactoredDelta)}
                add_factors([factors[each] for each in own], some, onto)  # type: ignore[index]
            if not whole:
                outputs[rows, :, columns] = onto
        return outputs.view(*first.shape[:-sizes], *outputs.shape[2:]).movedim(0, place[0])


class Calls:
    """Calls of a model, or of parts of it, with a batch; places of samples that they find are added to ``known``."""

    def __init__(self, layers: Sequence[str], count: int, known: dict[Hashable, Places]) -> None:
        self.layers, self.count, self.known = tuple(layers), count, known
        self.outermost: nn.Module | None = None
        self.places: Places = {}
        self.uses: dict[str, int] = {}
        self.seen: dict[str, list[Tensor]] | None = None  # inputs of the layers, in a call of the base model

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Watch the calls of the layers, and of all modules that contain them, inside a ``with`` block."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if any(f"{layer}.".startswith(f"{path}.".lstrip(".")) for layer in self.layers):
                    begin = partial(self._begin, path)
                    stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._end, always_call=True).remove)
            yield

    def place(self, path: str, x: Tensor) -> Place | None:
        """Return the place of the samples in a layer's input; None in a call of the base model."""
        if self.seen is not None:
            self.seen.setdefault(path, []).append(x)
            return None
        use = self.uses[path] = self.uses.get(path, -1) + 1
        places = self.places.get(path, []) if self.outermost is not None else []
        dim, rows = places[use] if use < len(places) else (0, 0)
        if not rows or x.shape[dim : dim + 1] != (self.count * rows,):
            raise _unknown(path, f"has shape {tuple(x.shape)} for {self.count} samples")
        return dim, rows

    def _begin(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.outermost is not None or self.seen is not None:
            return
        leaves, spec = tree_flatten((args, kwargs))
        batch = [isinstance(leaf, Tensor) and leaf.shape[:1] == (self.count,) for leaf in leaves]
        name = path or type(module).__name__
        if odd := [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _KNOWN)]:
            raise UserError(f"{name} gets a {odd[0]}, which cannot be divided into samples. Use one adapter at a time.")
        if not any(batch):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor)) or "none"
            raise UserError(f"{name} gets inputs of shapes {shapes} for {self.count} names. Pass a name per sample.")
        facts = [
            f"{leaf.dtype} {leaf.shape[own:]} {own}" if isinstance(leaf, Tensor) else repr(leaf)
            for leaf, own in zip(leaves, batch, strict=True)
        ]
        key = path, self.layers, str(spec), *facts
        if key not in self.known:
            if len(self.known) >= _MOST:  # texts of many lengths
                self.known.clear()
            self.known[key] = self._find(name, module, leaves, batch, spec)
        self.outermost, self.places, self.uses = module, self.known[key], {}

    def _end(self, module: nn.Module, *_: object) -> None:
        if module is self.outermost:
            self.outermost = None

    def _find(self, name: str, module: nn.Module, leaves: list[Any], batch: list[bool], spec: TreeSpec) -> Places:
        """Call the base model with one sample and with two, and return the places of samples in inputs of layers."""
        inputs: list[dict[str, list[Tensor]]] = [{}, {}]
        outputs: list[list[Any]] = []
        for size, self.seen in enumerate(inputs, 1):
            some = [_few(leaf, size) if own else leaf for leaf, own in zip(leaves, batch, strict=True)]
            args, kwargs = tree_unflatten(some, spec)
            try:
                outputs.append(tree_leaves(module.forward(*args, **kwargs)))
            finally:
                self.seen = None
        for one, two in zip(*outputs, strict=False):  # there may be a list of samples
            if isinstance(one, Tensor) and len(_grown(one, two)) > 1:
                raise UserError(
                    f"{name} compares samples with one another: it returns {tuple(one.shape)} for one sample and "
                    f"{tuple(two.shape)} for two. Call the part that encodes them, or use one adapter at a time."
                )
        both = ((path, zip(uses, inputs[1].get(path, []), strict=False)) for path, uses in inputs[0].items())
        return {path: [_place(path, *pair) for pair in pairs] for path, pairs in both}


_MOST = 128
_KNOWN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


def _unknown(path: str, what: str) -> UserError:
    return UserError(
        f"{path or 'the model'}: the input {what}, so the rows of each sample are unknown. Call the part that encodes "
        "the samples, such as encode_image, or use one adapter at a time."
    )


def _few(leaf: Tensor, size: int) -> Tensor:
    """Return the first sample, or it and one that certainly differs: zeros in masks show rows that depend on them."""
    other = leaf[:1].flip(-1) + 1 if leaf.is_floating_point() else torch.zeros_like(leaf[:1])
    return torch.cat([leaf[:1], other][:size])


def _grown(one: Tensor, two: Tensor) -> list[int]:
    """Return the dimensions that differ."""
    return [dim for dim in range(one.dim()) if one.shape[dim : dim + 1] != two.shape[dim : dim + 1]]


def _place(path: str, one: Tensor, two: Tensor) -> Place:
    """Return the place of samples in a layer's input, from inputs for one sample and for two."""
    what, grown = f"has shape {tuple(one.shape)} for one sample and {tuple(two.shape)} for two", _grown(one, two)
    if len(grown) != 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise _unknown(path, what)
    dim, rows = grown[0], one.shape[grown[0]]
    first, second = two.float().chunk(2, dim)
    moved, differs = (first - one.float()).norm(), (second - first).nan_to_num().norm()  # NaN: a mask hides all
    if not moved <= 0.1 * differs + 1e-4 * one.float().norm():  # rounding depends on the number of rows
        raise _unknown(path, f"{what}, in which the rows of the first sample move")
    return dim, rows


@contextmanager
def per_sample(
    model: nn.Module, updates: Sequence[Mapping[str, DeltaWeight]], known: dict[Hashable, Places]
) -> Iterator[None]:
    """Attach each sample's updates (by path) to a plain model inside a ``with`` block.

    Raises:
        UserError: A layer only builds a weight, which is one for all samples.
    """
    paths = sorted({path for own in updates for path in own})
    calls, attached = Calls(paths, len(updates), known), dict[str, PerSample]()
    for path in paths:
        layer = model.get_submodule(path)
        if has_own_forward(type(layer)) or (isinstance(layer, nn.Linear) and reader_of(model, path) is not None):
            raise UserError(
                f"{path}: other code reads its weight, so samples of one batch cannot have different adapters. Use one "
                "adapter at a time."
            )
        attached[path] = PerSample(path, [own.get(path) for own in updates], calls, layer)
    attach(model, attached)
    try:
        with calls.watched(model):
            yield
    finally:
        detach(model)
        for each in attached.values():
            drop_kept(update for update, _ in each.alone if update is not None)


def drop_kept(updates: Iterable[DeltaWeight]) -> None:
    """Drop what updates keep between calls, so that adapters that are not in use occupy their own tensors only."""
    for update in updates:
        update.train(update.training)
