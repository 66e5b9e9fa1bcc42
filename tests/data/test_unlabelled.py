"""Images without labels, and what lies behind transparent ones wherever they are read."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from randlora_pl.data import ImageData, open_images
from randlora_pl.data.sources import decode
from randlora_pl.data.transforms import eval_batch
from randlora_pl.data.unlabelled import find_images, frame_of, read_image
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


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for label in ("box", "disc"):
        (tmp_path / label).mkdir()
        for number in range(6):
            Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / label / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(("background", "color"), [(None, 1.0), ("white", 1.0), ("black", 0.0), ("mean", None)])
def test_pictures_lie_on_the_background_wherever_they_are_read(
    background: str | None, color: float | None, pictures: Path
) -> None:
    data = ImageData(dataset="folder", root=str(pictures), background=background, steps=1, num_workers=0)
    data.spec = spec = ImageSpec(size=32)
    data.setup()
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    expected = (torch.zeros(3, 1, 1) if color is None else (color - mean) / std).expand(3, 32, 32)
    frame = frame_of({"training": {"frame": asdict(data.frame)}}, spec)
    file = next(pictures.rglob("*.png"))
    found = [next(iter(loader))["image"][0] for loader in (data.train_dataloader(), data.test_dataloader())]
    found += [next(iter(open_images([file], frame)[0]))["image"][0], read_image(file.read_bytes(), "a", frame)[0]]
    for image in found:
        torch.testing.assert_close(image, expected, rtol=0, atol=0.01)
    named = "the mean color" if color is None else background or "white"
    assert frame.steps().startswith(f"lay transparent pictures on {named}")


def test_another_background_is_refused(pictures: Path) -> None:
    with pytest.raises(UserError, match="background is"):
        ImageData(dataset="folder", root=str(pictures), background="red")
