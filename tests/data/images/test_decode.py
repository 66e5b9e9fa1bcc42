import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from randlora_pl.data.catalog import is_image
from randlora_pl.data.sources import MOST_BYTES, ArrayImages, BoxImages, FileImages, decode
from randlora_pl.data.transforms import eval_pixels, pixels_needed
from randlora_pl.utils.errors import TooLargeImageError, UnreadableImageError, UserError
from randlora_pl.utils.image_spec import RESIZES, ImageSpec
from tests.data.conftest import save_image
from tests.support.products import in_one_item


def gradient(mode: str) -> Image.Image:
    ramp = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (12, 1))
    return Image.fromarray(ramp).convert(mode)


@in_one_item(
    ("mode", "name"),
    [
        *((mode, "a.png") for mode in ("1", "L", "P", "RGBA", "LA")),
        *(("RGB", name) for name in ("a.ppm", "a.webp", "a.bmp")),
        ("P", "a.gif"),
        ("CMYK", "a.jpg"),
        ("L", "a.tiff"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, name: str) -> None:
    path = tmp_path / name
    gradient(mode).save(path)
    image = decode(path)
    assert image.shape == (12, 24, 3) and image.dtype == np.uint8 and image.flags.writeable
    if mode != "1":
        expected = np.asarray(gradient("L"), dtype=int)[..., None]
        assert np.abs(image - expected).max() <= (0 if name.endswith((".png", ".ppm", ".bmp", ".tiff")) else 12)


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(levels).save(path)
    assert np.array_equal(decode(path)[..., 1], np.arange(256).reshape(16, 16))


def odd_exif(orientation: int) -> bytes:
    """An orientation, and a horizontal resolution that is text where a fraction belongs."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


@in_one_item("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_orientation_is_turned_upright_whatever_else_exif_says(tmp_path: Path, orientation: int) -> None:
    turns = {
        2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    gradient("RGB").save(tmp_path / "a.jpg", exif=odd_exif(orientation), quality=95)
    stored = decode(tmp_path / "a.jpg", upright=False)
    assert np.array_equal(stored, np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))
    assert np.array_equal(decode(tmp_path / "a.jpg"), turns.get(orientation, lambda a: a)(stored))


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path: Path) -> None:
    gradient("RGB").save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert decode(tmp_path / "a.jpg").shape == (12, 24, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_jpegs_decode_as_pillow_does(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / "a.jpg", quality=80)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")).astype(int)
    assert np.abs(decode(tmp_path / "a.jpg") - expected).max() <= 1  # the two may bring different libraries


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing", "header"])
@in_one_item("suffix", [".png", ".jpg"])
def test_damaged_files_are_named(tmp_path: Path, damage: str, suffix: str) -> None:
    path = save_image(tmp_path / f"photo{suffix}", size=(64, 64))
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        bad = {"truncated": raw[: len(raw) // 2], "text": b"no image", "empty": b"", "header": raw[:20]}
        path.write_bytes(bad[damage])
    reason = "it is empty" if damage == "empty" else ".*"
    with pytest.raises(UserError, match=rf"The image .*photo{suffix} cannot be read: {reason}.*--data.on_error skip"):
        decode(path)


def test_image_bomb_is_refused(tmp_path: Path) -> None:
    header = b"P6 60000 60000 255\n"
    (tmp_path / "bomb.ppm").write_bytes(header + struct.pack("B", 0))
    with pytest.raises(UserError, match=r"bomb.ppm"):
        decode(tmp_path / "bomb.ppm")


@in_one_item(
    ("name", "expected"),
    [("a.jpg", True), ("A.JPEG", True), ("b.PnG", True), (".c.png", False), ("d.txt", False), ("e", False)],
)
def test_is_image(name: str, expected: bool) -> None:
    assert is_image(Path(name)) == expected


def test_transparent_images_lie_on_the_background(tmp_path: Path) -> None:
    half = np.full((2, 2, 4), (200, 0, 0, 51), np.uint8)  # a fifth of red
    Image.fromarray(half, "RGBA").save(tmp_path / "half.png")
    for color in ((255, 255, 255), (0, 0, 0), (10, 100, 250)):
        expected = np.round(0.2 * np.array([200, 0, 0]) + 0.8 * np.array(color))
        assert np.abs(decode(tmp_path / "half.png", background=color).astype(int) - expected).max() <= 1


def test_eight_bits_in_a_sixteen_bit_file_stay_visible(tmp_path: Path) -> None:
    grey = np.arange(200, dtype=np.uint16).reshape(10, 20)
    Image.fromarray(grey).save(tmp_path / "shallow.png")
    assert np.array_equal(decode(tmp_path / "shallow.png")[..., 0], grey)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).random((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float.tiff"):
        decode(tmp_path / "float.tiff")


def test_paths_and_names_are_made_when_asked_for(tmp_path: Path) -> None:
    assert ArrayImages(np.zeros((2, 1, 1, 1), dtype=np.uint8), "digits").name(1) == "digits 1"
    images = FileImages(["a/b.jpg", "c.jpg", "d.jpg"], tmp_path)
    assert len(images) == 3 and images.path(1) == tmp_path / "c.jpg" and images.path(-1) == tmp_path / "d.jpg"
    assert images.name(0) == str(tmp_path / "a" / "b.jpg")


def test_boxes_are_cut_out(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png", size=(20, 16))
    images = BoxImages([path, path], boxes=np.asarray([[2, 3, 10, 16], [19, 0, 40, 1]]))
    whole = decode(path)
    assert len(images) == 2 and np.array_equal(images.load(0), whole[3:16, 2:10])
    assert images.load(0).flags.owndata and images.load(1).shape == (1, 1, 3)  # a box may reach over the edge
    assert images.name(0) == f"{path} (2, 3, 10, 16)"


def test_boxes_count_the_pixels_as_they_are_stored(tmp_path: Path) -> None:
    gradient("RGB").save(tmp_path / "a.jpg", exif=odd_exif(6), quality=95)
    part = BoxImages([tmp_path / "a.jpg"], boxes=np.array([[14, 0, 24, 12]])).load(0)
    assert np.array_equal(part, decode(tmp_path / "a.jpg", upright=False)[:, 14:])


@pytest.mark.parametrize(("size", "factor"), [((1280, 960), 2), ((2048, 1536), 4), ((1281, 960), 1), ((2052, 1538), 2)])
def test_reduced_decoding_hardly_changes_an_evaluated_photograph(size: tuple[int, int], factor: int) -> None:
    """The means are a third of a gray level; a size that the factor does not divide would give 5."""
    stream = io.BytesIO()
    photo = Image.fromarray(load_sample_images().images[0]).resize(size, Image.Resampling.BICUBIC)
    photo.save(stream, "JPEG", quality=92)
    full = decode("it", 0, stream.getvalue())
    for resize in RESIZES:
        frame = ImageSpec(160, resize=resize)
        reduced = decode("it", pixels_needed(frame, None), stream.getvalue())
        assert reduced.shape[1] * factor == size[0]
        first, second = (eval_pixels([torch.from_numpy(pixels)], frame).int() for pixels in (full, reduced))
        assert (first - second).abs().max() <= 12 and (first - second).abs().float().mean() < 0.5


@pytest.mark.parametrize(("short", "size"), [(0, (640, 480)), (241, (640, 480)), (240, (320, 240)), (60, (80, 60))])
def test_a_jpeg_is_decoded_at_a_fraction_that_keeps_the_pixels_needed(
    tmp_path: Path, short: int, size: tuple[int, int]
) -> None:
    ramp = np.linspace(0, 255, 480 * 640).reshape(480, 640).astype(np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(ramp).convert("RGB").save(path, quality=95)
    small = decode(path, short)
    assert small.shape == (size[1], size[0], 3)
    expected = np.asarray(Image.open(path).convert("RGB").resize(size, Image.Resampling.BOX)).astype(int)
    assert np.abs(small - expected).max() <= 3
    assert np.array_equal(decode(Path("name"), short, path.read_bytes()), small)
    Image.fromarray(ramp).save(path.with_suffix(".png"))
    assert decode(path.with_suffix(".png"), 60).shape == (480, 640, 3)  # only JPEG can


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_plain_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "z.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"z.png"):
        decode(path)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)  # sparse
    with pytest.raises(UserError, match="bytes"):
        decode(tmp_path / "a.png")


def test_no_other_program_is_started_for_an_image(tmp_path: Path) -> None:
    (tmp_path / "e.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match="formats JPEG"):
        decode(tmp_path / "e.png")


def test_an_image_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png", size=(20, 10))
    assert decode(path, most_pixels=200).shape == (10, 20, 3)
    with pytest.raises(UserError, match=r"200 pixels; the limit is 199.*allow it with --data.max_pixels N"):
        FileImages([path], most_pixels=199).load(0)


def test_an_image_above_the_default_limit_can_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)  # Pillow refuses twice as many
    monkeypatch.setattr("randlora_pl.data.sources.MOST_PIXELS", 160)
    path = save_image(tmp_path / "a.png", size=(20, 10))
    with pytest.raises(TooLargeImageError, match=r"more pixels than the limit of 160.*--data.max_pixels N"):
        decode(path, most_pixels=160)
    assert decode(path, most_pixels=200).shape == (10, 20, 3)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(24, "Too many open files"), OSError("out of memory error when reading image file")]
)
def test_a_machine_that_runs_out_is_not_an_unreadable_image(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    path = save_image(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(UserError, match=r"of memory|open files") as caught:
        decode(path)
    assert not isinstance(caught.value, UnreadableImageError)
