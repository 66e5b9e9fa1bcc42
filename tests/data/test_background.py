"""Transparent pictures: the color behind them in training, in evaluation, and in predictions from a file."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from randlora_pl.data import ImageData, open_images
from randlora_pl.data.unlabelled import frame_of, read_image
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec


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
