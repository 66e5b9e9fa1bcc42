"""Operations and bytes of each custom operator from its shapes: what it has to read and write once.

A tile that several programs read counts once, because caches of a device serve the others. ``bench trace`` adds them
to the costs of PyTorch's operators; a test compares them with the loads and stores of the kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.stack import tile
from randlora_pl.adapters.kernels.triton_kernels.ternary import parts_of


class KernelCost(NamedTuple):
    """Cost of a call.

    Attributes:
        flops: Operations of matrix products.
        read: Bytes that the kernel reads.
        written: Bytes that the kernel writes.
        summed: Bytes of partial sums, which a second launch reads, and of its result: (0, 0) without.
    """

    flops: int
    read: int
    written: int
    summed: tuple[int, int] = (0, 0)

    @property
    def launches(self) -> int:
        """Number of launches."""
        return 2 if any(self.summed) else 1


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _form_stack(args: Sequence[Any], result: Any) -> KernelCost:
    return KernelCost(0, _bytes(*args[:3]), _bytes(result))


def _reduce_stack(args: Sequence[Any], result: Any) -> KernelCost:
    gradient, lambdas, gammas, a = args[:4]
    (count, rank), small = lambdas.shape, gammas.shape[1]
    parts = -(-small // tile(count, rank, small)[2]) * count * rank * 4
    read = count * rank * small * gradient.element_size() + _bytes(lambdas, gammas, a)
    return KernelCost(0, read, parts + _bytes(result[1]), (parts, _bytes(result[0])))


def _build_weight(args: Sequence[Any], result: Any) -> KernelCost:
    weight, b, lambdas, gammas, a = args[:5]
    columns = lambdas.numel()
    read = len(b) * columns * b.element_size() + _bytes(weight, lambdas, gammas, a)
    return KernelCost(2 * len(b) * gammas.shape[1] * columns, read, _bytes(result))


def _project(args: Sequence[Any], result: Any) -> KernelCost:
    x, signs, h, small = args[:4]
    copies = -(-x.shape[1] // small)
    return KernelCost(2 * x.numel() * len(h), _bytes(x, h) + copies * small * signs.element_size(), _bytes(result))


def _expand(args: Sequence[Any], result: Any) -> KernelCost:
    mixed, onto, signs, h, large = args[:5]
    copies, small = -(-large // mixed.shape[1]), mixed.shape[1]
    read = _bytes(mixed, onto, h) + copies * small * signs.element_size()
    return KernelCost(2 * result.numel() * len(h), read, _bytes(result))


def _mix(args: Sequence[Any], result: Any) -> KernelCost:
    lambdas, gammas, a, signs, o = args[:5]
    read = _bytes(lambdas, gammas, a, o) + gammas.shape[1] * signs.element_size()
    return KernelCost(2 * result.numel() * len(o), read, _bytes(result))


def _unmix(args: Sequence[Any], result: Any) -> KernelCost:
    mixed, signs, o = args[:3]
    read = _bytes(mixed, o) + len(mixed) * signs.element_size()
    return KernelCost(2 * mixed.numel() * len(o), read, _bytes(result))


def _ternary_project(args: Sequence[Any], result: Any) -> KernelCost:
    x, b, columns = args[:3]
    (tokens, height), parts = x.shape, parts_of(*b.shape)[0]
    flops, read = 2 * tokens * height * columns, _bytes(x, b)
    if parts == 1:
        return KernelCost(flops, read, _bytes(result))
    partial = parts * tokens * columns * 4
    return KernelCost(flops, read, partial, (partial, _bytes(result)))


def _ternary_expand(args: Sequence[Any], result: Any) -> KernelCost:
    y, b = args[:2]
    return KernelCost(2 * result.numel() * y.shape[1], _bytes(y, b), _bytes(result))


COSTS: dict[str, Callable[[Sequence[Any], Any], KernelCost]] = {
    "randlora::form_stack": _form_stack,
    "randlora::reduce_stack": _reduce_stack,
    "randlora::build_weight": _build_weight,
    "randlora::hadamard_project": _project,
    "randlora::hadamard_expand": _expand,
    "randlora::hadamard_mix": _mix,
    "randlora::hadamard_unmix": _unmix,
    "randlora::ternary_project": _ternary_project,
    "randlora::ternary_expand": _ternary_expand,
}
"""Formula of each operator, from its arguments by position and its result."""
