"""Descriptions of adapters that something is missing from, or whose values are of other kinds."""

from typing import Any

import pytest

from randlora_pl.utils.adapter_schema import check_adapter_schema, check_arguments
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

FRAME: dict[str, Any] = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [1, 0.5, 0.5], "interpolation": "bicubic"}
FRAME |= {"resize": "squash", "crop_pct": 0.9, "fill": [0, 0, 255]}


def whole() -> dict[str, Any]:
    return {
        "format_version": 4,
        "method": "LoRA",
        "options": {"rank": 2},
        "seed": None,
        "targets": ["mlp"],
        "layers": {"fc1": [4, 4]},
        "base_model": {"library": "timm", "name": "x", "image_size": 32},
        "metadata": {
            "task": "TextHeadTask", "arguments": {}, "classnames": ["a", "b"], "templates": [], "note": 7,
            "training": {"frame": dict(FRAME), "step": 3},
        },
    }  # fmt: skip


@in_one_item(
    ("path", "value", "message"),
    [
        ("method", None, "method is None"),
        ("options", [1], r"options is \[1\]"),
        ("seed", True, "seed is True"),
        ("targets", "mlp", "targets is 'mlp'"),
        ("targets", [3], r"targets\[0\] is 3"),
        ("layers", {"fc1": [4, "x"]}, r"layers.fc1\[1\] is 'x'"),
        ("base_model", None, "base_model is None"),
        ("base_model.name", 7, "base_model.name is 7"),
        ("metadata.classnames", ["a", 7], r"metadata.classnames\[1\] is 7"),
        ("metadata.training.frame", 7, "metadata.training.frame is 7"),
        ("metadata.training.frame.mean", [1, 2], r"frame.mean is \[1, 2\]"),
        ("metadata.training.frame.resize", "crop", "frame.resize is 'crop'"),
        ("metadata.training.frame.fill", [0, 0, 0.5], r"frame.fill\[2\] is 0.5"),
        ("metadata.training.frame.fill", [0, 0, 999], "frame has the fill .* from 0 to 255"),
        ("metadata.training.frame.crop_pct", 0, "frame has the crop_pct 0. .* from 0.05 to 20"),
        ("metadata.training.frame.crop_pct", float("nan"), "frame has the crop_pct nan.*"),
        ("metadata.training.frame.mean", [0.5, 0.5, float("nan")], "frame has the mean .*"),
        ("metadata.training.frame.size", 10**18, "frame has the size 10+.*"),
        ("metadata.training.frame.crop_pct", ..., "frame.crop_pct is missing"),
        ("method", ..., "method is missing"),
        ("metadata.classnames", ..., "metadata.classnames is missing"),
    ],
)
def test_the_first_value_that_does_not_fit_is_named(path: str, value: Any, message: str) -> None:
    config = whole()
    check_adapter_schema(config, "adapter")
    *above, last = path.split(".")
    holder = config
    for name in above:
        holder = holder[name]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    with pytest.raises(UserError, match=f"adapter is damaged or was changed: .*{message}. Copy it again"):
        check_adapter_schema(config, "adapter")


def test_without_a_task_little_is_needed() -> None:
    check_adapter_schema({"format_version": 4, "method": "LoRA", "options": {}, "metadata": {"classnames": ["a"]}}, "a")


def test_arguments_of_a_function() -> None:
    def function(rank: int, rate: float | None = None) -> None: ...

    check_arguments(function, {"rank": 3, "rate": 1}, "a")
    with pytest.raises(UserError, match="'x'"):
        check_arguments(function, {"rank": 3, "rate": "x"}, "a")
    with pytest.raises(UserError, match="unknown"):
        check_arguments(function, {"depth": 3}, "a")
