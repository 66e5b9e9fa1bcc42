"""Learning rates by method and task: Table 8 and sections C.2 and C.3 of the paper."""

from randlora_pl.adapters import Adapter

_TABLE_8 = {"FullFineTuning": 1e-5, "LoRA": 1e-3, "NoLA": 1e-3, "VeRA": 1e-2, "RandLoRA": 1e-3}
_VISION_ONLY = {"LoRA": 1e-2, "RandLoRA": 1e-2}  # section C.3; the others are not restated there
_NOT_IN_THE_PAPER = {"BitFit": 1e-3, "LinearProbe": 1e-3}


def default_learning_rate(adapter: Adapter, vision_only: bool) -> float:
    """The paper's learning rate for a method; DoRA takes that of its inner method.

    Args:
        adapter: The method.
        vision_only: Whether only an image tower trains (section 5.2) or both towers (section 5.3).
    """
    method = getattr(adapter, "inner", adapter).method()
    rates = _TABLE_8 | _NOT_IN_THE_PAPER | (_VISION_ONLY if vision_only else {})
    return rates[method]
