"""Adapters written by earlier versions load for ever, with the same predictions.

`saved/` holds adapters of the tiny CLIP (`v3-statistics`: of timm's test_resnet), written by the version that
introduced each format and never again: `v2-*` by format 2, `v3-*` by format 3, each with the logits that it gave for
four digits beside it.
"""

import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from randlora_pl.adapters import RandLoRA, read_adapter
from randlora_pl.adapters.io.save_load import make_adapter
from randlora_pl.tasks import load_task
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.reuse import caching
from tests.support.products import in_one_item

SAVED = Path(__file__).parent / "saved"
NAMES = sorted(path.stem for path in SAVED.glob("*.json"))


def digits(size: int) -> torch.Tensor:
    images = torch.from_numpy(load_digits().images[:4]).float()[:, None].expand(-1, 3, -1, -1) / 16
    return 2 * torch.nn.functional.interpolate(images, (size, size), mode="bilinear") - 1


def path_of(name: str) -> Path:
    return SAVED / name if (SAVED / name).is_dir() else SAVED / f"{name}.safetensors"


@caching()
@in_one_item("name", NAMES)
def test_an_adapter_of_an_earlier_version_predicts_the_same(name: str) -> None:
    task = load_task(path_of(name))
    with torch.no_grad():
        logits = task.class_logits(digits(task.image_spec.size))
    expected = torch.tensor(json.loads((SAVED / f"{name}.json").read_text()))
    torch.testing.assert_close(logits, expected, atol=2e-3 if "bf16" in name else 2e-4, rtol=1e-3)
    assert task.classnames == ["zero", "one", "two"]


def test_every_format_is_there() -> None:
    versions = {read_adapter(path_of(name)).config["format_version"] for name in NAMES}
    assert versions == {2, 3}
    assert {read_adapter(path_of(name)).adapter.method() for name in NAMES} >= {"RandLoRA", "LoRA", "VeRA", "DoRA"}
    assert any(path_of(name).is_file() for name in NAMES)
    assert any(read_adapter(path_of(name)).kept for name in NAMES)
    assert any(read_adapter(path_of(name)).bases is not None for name in NAMES)


def test_dense_a_of_earlier_versions_is_the_basis_of_a() -> None:
    """An adapter that was trained with the old default of ternary bases, a ternary A, keeps it."""
    assert read_adapter(path_of("v2-ternary-a")).adapter.identity()["options"]["a_basis"] == "ternary"
    for dense, now in [
        (False, RandLoRA(basis="ternary", a_basis="same")),
        (True, RandLoRA(basis="ternary", a_basis="uniform")),
        (False, RandLoRA()),
        (False, RandLoRA(basis="hadamard")),
    ]:
        options = now.options() | {"dense_a": dense}
        options.pop("a_basis")
        earlier = make_adapter("RandLoRA", options, "a file")
        assert earlier.identity() == now.identity()
    assert RandLoRA(basis="ternary").identity() != RandLoRA(basis="ternary", a_basis="same").identity()
    with pytest.raises(UserError, match="dense_a"):
        make_adapter("RandLoRA", {"dense_a": "yes"}, "a file")
