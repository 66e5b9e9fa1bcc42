"""Learning rates by method and task (Table 8 and sections C.2 and C.3 of the paper)."""

from collections.abc import Callable, Sequence
from typing import Any

from randlora_pl.adapters import SVFT, Adapter
from randlora_pl.adapters.registry import parent_method
from randlora_pl.utils.errors import UserError

_TABLE_8 = {"FullFineTuning": 1e-5, "LoRA": 1e-3, "NoLA": 1e-3, "VeRA": 1e-2, "RandLoRA": 1e-3}
_VISION_ONLY = {"LoRA": 1e-2, "RandLoRA": 1e-2}  # section C.3; the others are not restated there
_NOT_IN_THE_PAPER = {
    "AdaLoRA": 1e-3,  # its scripts: 5e-4 (MNLI) to 2.2e-3 (STS-B)
    "AutoLoRA": 3e-4,  # its code, for RoBERTa
    "BitFit": 1e-3,
    "Fira": 1e-4,  # its released script for commonsense, with scale 1
    "Frozen": 1e-3,  # nothing trains
    "GaLore": 3e-5,  # its released script for GLUE
    "HiRA": 4.5e-3,  # PEFT's benchmark, on a language model
    "HydraLoRA": 2e-4,  # its code, for language models
    "KRAdapter": 1e-3,  # a first value; none is published
    "LinearProbe": 1e-3,
    "LoRAXS": 1e-3,  # its released scripts for GLUE, up to this
    "OFT": 1e-4,  # PEFT's benchmark, on a language model
    "PRANC": 1e-3,  # its code, from scratch
    "SHiRA": 3e-4,  # PEFT's benchmark, on a language model
    "PiSSA": 1e-4,  # a first value; published for language models only (2e-5)
}


def default_learning_rate(adapter: Adapter, vision_only: bool) -> float:
    """Return the paper's learning rate for a method and an image tower (section 5.2) or both towers (section 5.3).

    DoRA takes the rate of its inner method, and a sum of methods the lowest of its parts' rates.
    """
    rates = _TABLE_8 | _NOT_IN_THE_PAPER | (_VISION_ONLY if vision_only else {})
    return lowest_rate(adapter, lambda method: rates[method])


def lowest_rate(adapter: Adapter, rate: Callable[[str], float]) -> float:
    """Return the lowest learning rate of the methods inside an adapter; one from outside has its nearest parent's.

    Args:
        adapter: The adapter.
        rate: Function that returns the rate of a method of this program by its name.

    Raises:
        UserError: A method from outside has no parent that gives it a rate.
    """
    if alone := [leaf.method() for leaf in adapter.leaves() if not parent_method(leaf)]:
        raise UserError(f"{alone[0]} has no learning rate of its own. Set it: --model.learning_rate 1e-3, for example.")
    return min(svft_rate(each) if isinstance(each, SVFT) else rate(parent_method(each)) for each in adapter.leaves())


def svft_rate(adapter: SVFT) -> float:
    """Return the rate of SVFT's code, which is lower with more than two diagonals on each side."""
    return 5e-2 if adapter.half_width <= 2 else 5e-3


def check_classes(task: Any, classnames: Sequence[str], scores: bool = False) -> None:
    """Refuse fewer than two classes, and others than a task was built for; with ``scores`` there may be none."""
    if task.backbone is not None and list(classnames) != task.classnames:
        there, here = (
            f"{len(names)} classes {list(names[:3])}" if names else "scores" for names in (task.classnames, classnames)
        )
        raise UserError(f"the task was built for {there}, the data has {here}. Create a new task.")
    if len(classnames) < (0 if scores and not classnames else 2):
        raise UserError(f"there is only the class {list(classnames)}; a classifier needs two or more.")
