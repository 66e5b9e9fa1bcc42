"""Adapters that were saved once load with the same predictions.

`saved/` holds adapters of the tiny CLIP (`statistics`: of timm's test_resnet), each with the logits that it gave for
four digits beside it.
"""

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from randlora_pl.adapters import read_adapter
from randlora_pl.tasks import load_task
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
def test_a_saved_adapter_predicts_the_same(name: str) -> None:
    task = load_task(path_of(name))
    with torch.no_grad():
        logits = task.class_logits(digits(task.image_spec.size))
    expected = torch.tensor(json.loads((SAVED / f"{name}.json").read_text()))
    torch.testing.assert_close(logits, expected, atol=2e-3 if "bf16" in name else 2e-4, rtol=1e-3)
    assert task.classnames == ["zero", "one", "two"]


def test_every_kind_of_file_is_there() -> None:
    files = [read_adapter(path_of(name)) for name in NAMES]
    assert {file.adapter.method() for file in files} >= {"RandLoRA", "LoRA", "VeRA", "DoRA", "BitFit"}
    assert any(file.path.is_file() for file in files)
    assert any(file.kept for file in files)
    assert any(file.bases is not None for file in files)
