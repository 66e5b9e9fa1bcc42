"""Adapters of models in folders and at the Hub: saved without paths, loaded again, merged."""

import json
import os
from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import read_adapter
from randlora_pl.interop.base_model import load_base
from randlora_pl.interop.merge import LibraryModel, merged, write
from randlora_pl.models.catalog import check_config
from randlora_pl.tasks import load_task
from randlora_pl.utils import weights_files
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import base_arguments, register_weights
from tests.interop.adapters import saved
from tests.models.folders.make import clip_folder, vit_folder

CONFIGS = {"clip": "open_clip_config.json", "vit": "config.json"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_a_folder_is_loaded_and_merged_wherever_the_folder_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    private = tmp_path / "private"
    private.mkdir()
    folder = {"clip": clip_folder, "vit": vit_folder}[kind](private / kind)
    task = saved(tmp_path / "a", "linear head", name=f"local-dir:{folder}", pretrained=None)
    assert all(b"private" not in file.read_bytes() for file in (tmp_path / "a").iterdir())
    file = read_adapter(tmp_path / "a")
    images = torch.randn(2, 3, task.image_spec.size, task.image_spec.size)
    task.prepare_evaluation()
    expected = task.class_logits(images)
    torch.testing.assert_close(load_task(tmp_path / "a").class_logits(images), expected)
    write(tmp_path / "m.safetensors", merged(load_base(file), file))
    assert LibraryModel.make(file.config["base_model"]).image.mean == (0.1, 0.2, 0.3)

    moved = tmp_path / "moved"
    folder.rename(moved)
    monkeypatch.setattr(weights_files, "_here", {})
    with pytest.raises(UserError, match="--pretrained"):
        load_task(tmp_path / "a")
    register_weights([moved])
    torch.testing.assert_close(load_task(tmp_path / "a").class_logits(images), expected)
    config = moved / CONFIGS[kind]
    config.write_text(config.read_text() + " ")
    monkeypatch.setattr(weights_files, "_here", {})
    with pytest.raises(UserError, match="configuration"):
        load_task(tmp_path / "a")


def test_a_repository_whose_configuration_changed_is_refused() -> None:
    base = {"name": "hf-hub:ann/clip", "pretrained": "w.safetensors", "sha256": "a" * 64, "config_sha256": "b" * 64}
    assert base_arguments(base, "a") == {"pretrained": "own"}
    check_config(json.loads(json.dumps(base)), "b" * 64, "a")
    with pytest.raises(UserError, match="another one now"):
        check_config(base, "c" * 64, "a")
