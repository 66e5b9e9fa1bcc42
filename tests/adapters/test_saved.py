"""Adapters written by earlier versions load with the same predictions, those of format 3 once more.

`saved/` holds adapters of the tiny CLIP (`v3-statistics`: of timm's test_resnet), each with the logits that it gave for
four digits beside it. `v3-*` were written by the version that introduced format 3, and never again. `v4-*` were written
by earlier versions, and converted to format 4.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits

from randlora_pl.adapters import RandLoRA, read_adapter
from randlora_pl.adapters.io.save_load import copy_adapter, make_adapter
from randlora_pl.config.adapter_config import adapter_config
from randlora_pl.data.unlabelled import frame_of
from randlora_pl.tasks import load_task
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.reuse import caching
from tests.support.products import in_one_item

SAVED = Path(__file__).parent / "saved"
NAMES = sorted(path.stem for path in SAVED.glob("*.json"))


def digits(size: int) -> torch.Tensor:
    images = torch.from_numpy(load_digits().images[:4]).float()[:, None].expand(-1, 3, -1, -1) / 16
    return 2 * torch.nn.functional.interpolate(images, (size, size), mode="bilinear") - 1


def _config(name: str) -> str:
    path = path_of(name)
    if path.is_dir():
        return (path / "adapter_config.json").read_text()
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["adapter_config"])


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
    assert versions == {4}  # files of format 3 are read as such
    assert {json.loads(_config(name))["format_version"] for name in NAMES} == {3, 4}
    assert {read_adapter(path_of(name)).adapter.method() for name in NAMES} >= {"RandLoRA", "LoRA", "VeRA", "DoRA"}
    assert any(path_of(name).is_file() for name in NAMES)
    assert any(read_adapter(path_of(name)).kept for name in NAMES)
    assert any(read_adapter(path_of(name)).bases is not None for name in NAMES)


def test_a_file_of_format_3_is_prepared_as_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shorter side and crop for every model, or a square of the mean color; one line for each file."""
    for old, now in (("crop", "shortest"), (None, "shortest"), ("pad", "longest")):
        folder = tmp_path / f"of {old}"
        shutil.copytree(SAVED / "v3-lora", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        frame = {"size": 32, "mean": [-0.2, 0.4, 1.4], "std": [0.5] * 3, "interpolation": "bicubic", "resize": old}
        config["metadata"]["training"] = {"frame": {name: value for name, value in frame.items() if value is not None}}
        del config["sha256"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        caplog.clear()
        squashing = ImageSpec(32, resize="squash", crop_pct=0.9)
        found = [frame_of(read_adapter(folder).metadata, squashing) for _ in range(2)]
        assert (found[0].resize, found[0].crop_pct) == (now, 1) and found[0] == found[1]
        assert found[0].fill == ((0, 102, 255) if now == "longest" else (0, 0, 0))
        assert adapter_config(folder)["data"]["resize"] == now
        assert len(caplog.messages) == 1 and f"adapter export '{folder}' --to adapter --output NEW" in caplog.text
        copy_adapter(folder, tmp_path / "new")
        assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["format_version"] == 4
        assert frame_of(read_adapter(tmp_path / "new").metadata, squashing) == found[0]
    assert len(caplog.messages) == 1


def test_dense_a_of_earlier_versions_is_the_basis_of_a() -> None:
    """An adapter that was trained with the old default of ternary bases, a ternary A, keeps it."""
    assert read_adapter(path_of("v4-ternary-a")).adapter.identity()["options"]["a_basis"] == "ternary"
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
