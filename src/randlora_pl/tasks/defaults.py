"""Learning rates by method and task (Table 8 and sections C.2 and C.3 of the paper), and what options may be."""

from typing import Any

from randlora_pl.adapters import Adapter
from randlora_pl.utils.errors import UserError

_TABLE_8 = {"FullFineTuning": 1e-5, "LoRA": 1e-3, "NoLA": 1e-3, "VeRA": 1e-2, "RandLoRA": 1e-3}
_VISION_ONLY = {"LoRA": 1e-2, "RandLoRA": 1e-2}  # section C.3; the others are not restated there
_NOT_IN_THE_PAPER = {"BitFit": 1e-3, "LinearProbe": 1e-3}

FROZEN_DTYPES = ("float32", "bfloat16")


def default_learning_rate(adapter: Adapter, vision_only: bool) -> float:
    """Return the paper's learning rate for a method; DoRA takes the rate of its inner method.

    Args:
        adapter: The method.
        vision_only: Whether only an image tower trains (section 5.2) or both towers (section 5.3).
    """
    method = getattr(adapter, "inner", adapter).method()
    rates = _TABLE_8 | _NOT_IN_THE_PAPER | (_VISION_ONLY if vision_only else {})
    return rates[method]


def check_options(
    learning_rate: float | None,
    weight_decay: float,
    warmup_steps: int,
    final_lr_fraction: float,
    max_grad_norm: float | None,
) -> None:
    """Check the numbers that all tasks take.

    Raises:
        UserError: See `check_option`.
    """
    check_rate("learning_rate", learning_rate)
    check_option("weight_decay", weight_decay, weight_decay >= 0, "0 or a positive number")
    check_option("warmup_steps", warmup_steps, warmup_steps >= 0, "0 or a positive number")
    check_option("final_lr_fraction", final_lr_fraction, 0 <= final_lr_fraction <= 1, "a number from 0 to 1")
    fits = max_grad_norm is None or max_grad_norm > 0
    check_option("max_grad_norm", max_grad_norm, fits, "a positive number, or null for no clipping")


def check_rate(name: str, rate: float | None) -> None:
    """Check a learning rate; None passes.

    Raises:
        UserError: See `check_option`.
    """
    check_option(name, rate, rate is None or rate > 0, "a positive number")


def check_smoothing(share: float) -> float:
    """Return a share of label smoothing.

    Raises:
        UserError: See `check_option`.
    """
    check_option("label_smoothing", share, 0 <= share < 1, "a number from 0 to below 1")
    return share


def check_option(name: str, value: Any, fits: bool, allowed: str) -> None:
    """Raise an error for an option that does not fit.

    Raises:
        UserError: Names the option, its value, and what it may be.
    """
    if not fits:
        raise UserError(f"{name} is {value}: give {allowed} (--model.{name}).")


def check_precision(precision: str | None, frozen_dtype: str) -> None:
    """Refuse precisions of the trainer in which training would fail or its small steps would be rounded away.

    Args:
        precision: Lightning's name, None without a trainer.
        frozen_dtype: Dtype of the frozen matrices.

    Raises:
        UserError: Says which to take.
    """
    if precision in ("bf16-true", "16-true"):
        raise UserError(
            f"--trainer.precision {precision} would round what trains, and its small steps, too: take bf16-mixed, and "
            "--model.frozen_dtype bfloat16 to keep the frozen weights in half the memory."
        )
    if frozen_dtype == "bfloat16" and precision not in (None, "bf16-mixed"):
        raise UserError(
            f"--model.frozen_dtype bfloat16 goes with --trainer.precision bf16-mixed, and this is {precision}."
        )
