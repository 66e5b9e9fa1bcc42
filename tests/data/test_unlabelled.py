from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from randlora_pl.data import open_images
from randlora_pl.data.sources import decode
from randlora_pl.data.transforms import eval_batch
from randlora_pl.data.unlabelled import find_images, frame_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.data.conftest import Tree, save_image

FRAME = ImageSpec(12)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_follow_the_files(tree: Tree, tmp_path: Path, num_workers: int) -> None:
    root, single = tree(cat=3, dog=2), save_image(tmp_path / "photo.jpg", 9, (40, 30))
    loader, files = open_images([single, root], FRAME, batch_size=4, num_workers=num_workers)
    assert [file.name for file in files] == ["photo.jpg", "000.png", "001.png", "002.png", "000.png", "001.png"]
    batches = list(loader)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(6)) and len(loader) == 2
    images = torch.cat([batch["image"] for batch in batches])
    for image, file in zip(images, files, strict=True):
        assert torch.equal(image, eval_batch([torch.from_numpy(decode(file))], FRAME)[0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_named(tmp_path: Path, num_workers: int) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    loader, _ = open_images([tmp_path], FRAME, num_workers=num_workers)
    with pytest.raises(UserError, match=r"b.png"):
        list(loader)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.png"):
        find_images([tmp_path / "nowhere.png"])
    with pytest.raises(UserError, match="images"):
        find_images([tmp_path])
    with pytest.raises(UserError, match="images"):
        find_images([])


def test_a_frame_that_does_not_fit_the_model_is_refused() -> None:
    frame = ImageSpec(size=32)
    assert frame_of({"training": {"frame": asdict(frame) | {"of a later version": 1}}}, frame) == frame
    with pytest.raises(UserError, match="frame"):
        frame_of({"training": {"frame": asdict(frame) | {"size": 64}}}, frame)
