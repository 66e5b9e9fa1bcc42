"""Functions as operators of PyTorch, with the types that they were written with."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(name: str) -> Callable[[Function], Function]:
    """Return a decorator that makes an operator, such as ``randlora::build_weight``, which changes no argument."""

    def decorate(function: Function) -> Function:
        return cast(Function, torch.library.custom_op(name, function, mutates_args=()))

    return decorate


def fake_of(made: Function) -> Callable[[Function], Function]:
    """Return a decorator for the function that gives an operator's results without data."""
    return cast(Callable[[Function], Function], cast(Any, made).register_fake)
