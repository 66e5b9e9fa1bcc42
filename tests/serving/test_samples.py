"""Samples on the page: of the operator's folder, or of a public dataset; nobody's own images by themselves."""

import io
from pathlib import Path

import pytest
from PIL import Image

from randlora_pl.data.catalog import CATALOG
from randlora_pl.serving.uploads import COUNT, Limits, read_samples
from randlora_pl.utils.errors import UserError
from tests.serving import pictures
from tests.serving.server import Running
from tests.support.products import in_one_item

LIMITS = Limits(2_000_000, 4_000_000)


def trained_on(dataset: str) -> dict[str, dict[str, str]]:
    return {"training": {"dataset": dataset}}


def test_one_test_image_of_each_class_of_embedded_data() -> None:
    found = read_samples(None, trained_on("digits"), LIMITS)
    assert list(found) == [f"{name}.png" for name in CATALOG["digits"].classnames]
    assert len(set(found.values())) == 10
    assert {Image.open(io.BytesIO(content)).size for content in found.values()} == {(8, 8)}


@in_one_item("dataset", [name for name in CATALOG if name not in ("digits", "mnist_5k")] + ["", "gone"])
def test_no_other_data_are_shown_unasked(dataset: str) -> None:
    assert read_samples(None, trained_on(dataset), LIMITS) == {}
    assert read_samples(None, {}, LIMITS) == {}


def test_a_folder_is_shown_in_even_steps(tmp_path: Path) -> None:
    for number in range(25):
        file = tmp_path / ("cats" if number < 12 else "dogs & more") / f"{number:02d} é.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pictures.encode(pictures.photo(9 + number, 9), "PNG"))
    found = read_samples(tmp_path, trained_on("digits"), LIMITS)
    widths = [Image.open(io.BytesIO(content)).width - 9 for content in found.values()]
    assert len(found) == COUNT and widths == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert list(found)[:2] == ["1-00-.png", "2-02-.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "not an image"),
        (pictures.encode(pictures.photo(3000, 2000), "JPEG"), "6,000,000 pixels"),
        (pictures.encode(pictures.photo(9, 9), "PNG") + bytes(2_000_000), "2,000,000"),
    ],
)
def test_samples_keep_to_the_limits(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_samples(tmp_path, {}, LIMITS)


def test_samples_are_fetched_by_their_names_alone(server: Running) -> None:
    status, facts = server.ask("GET", "/health")
    assert status == 200 and facts["samples"][:2] == ["zero.png", "one.png"]
    assert Image.open(io.BytesIO(server.fetch("/samples/three.png"))).size == (8, 8)
    for path in ("/samples/none.png", "/samples/..%2Fpage.html", "/samples/", "/samples/../page.html"):
        assert server.ask("GET", path)[0] == 404, path
