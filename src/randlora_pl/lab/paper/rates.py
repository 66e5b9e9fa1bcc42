"""The paper's learning rates: Table 8 and section C.3 for images, Table 9 and the released scripts for texts."""

_BOTH_TOWERS = {"FullFineTuning": 1e-5, "LoRA": 1e-3, "NoLA": 1e-3, "VeRA": 1e-2, "RandLoRA": 1e-3}
_IMAGE_TOWER = _BOTH_TOWERS | {"LoRA": 1e-2, "RandLoRA": 1e-2}
_IMAGES = {"VisionLanguageTask": _BOTH_TOWERS, "TextHeadTask": _IMAGE_TOWER, "LinearHeadTask": _IMAGE_TOWER}
_IMAGES |= {"PromptTask": {}}  # another loss
_TEXTS = {"LoRA": (1e-4,), "DoRA": (1e-4,), "NoLA": (1e-4,), "RandLoRA": (1e-4,), "VeRA": (1e-4, 1e-2)}


def paper_rates(method: str, task: str) -> tuple[float, ...]:
    """Return the rates that the paper has for a method, several where table and script differ; empty where it has none.

    An unknown task is taken to be on texts.
    """
    if task in _IMAGES:
        return (_IMAGES[task][method],) if method in _IMAGES[task] else ()
    return _TEXTS.get(method, ())
