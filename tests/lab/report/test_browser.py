"""The page in a headless Chromium: as wide as the screen, nothing empty, nothing on top of something else, sortable."""

import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from randlora_pl.lab.report.advice import write
from tests.lab.report.advised import COMMANDS, FULL, HIRA, LORA, PROBE, near, stored
from tests.support.browser import NEEDED, contrast, opened_browser, set_screen
from tests.support.products import marked

pytestmark = [NEEDED, pytest.mark.slow]

BOXES = """
const kinds = "h1, h2, p:not(.hidden), li, .scroll, figure svg, figcaption";
return [...document.querySelectorAll(kinds)].filter(node => !node.querySelector(kinds)).map(node => {
  const box = node.getBoundingClientRect();
  return [node.tagName + " " + node.textContent.trim().slice(0, 40), box.left, box.top, box.right, box.bottom];
});
"""


@pytest.fixture(scope="module")
def driver(report: Path) -> Iterator[Any]:
    with opened_browser() as opened:
        opened.page = (report / "index.html").as_uri()
        yield opened


def show(driver: Any, width: int, scheme: str = "light", page: str = "") -> None:
    set_screen(driver, width, 900, scheme)
    driver.get(page or driver.page)


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)


WIDTHS = [390, pytest.param(1280, marks=pytest.mark.full)]


def check_layout(driver: Any, width: int) -> None:
    """The page is as wide as the screen, loads nothing, and no block lies on another."""
    wide, screen = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert screen == width and wide <= width
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    boxes = driver.execute_script(BOXES)
    assert len(boxes) > 30
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            across = min(one[3], other[3]) - max(one[1], other[1])
            down = min(one[4], other[4]) - max(one[2], other[2])
            assert across <= 1 or down <= 1, f"{one[0]!r} lies on {other[0]!r}"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_as_wide_as_the_screen_and_no_block_lies_on_another(driver: Any, width: int) -> None:
    show(driver, width)
    check_layout(driver, width)


def check_figures(driver: Any, width: int, scheme: str, count: int) -> None:
    """The page has the colors of the screen, and none of its figures is empty."""
    styles = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    page, ink = ([int(n) for n in value[4:-1].split(",")] for value in driver.execute_script(styles))
    assert (max(page) < 50 and min(ink) > 200) == (scheme == "dark")
    drawings = driver.find_elements("css selector", "figure svg")
    assert len(drawings) == count
    for drawing in drawings:
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", drawing)  # a part in view is not enough
        image = pixels(drawing.screenshot_as_png)
        assert image.shape[1] > 0.75 * min(width, 500) and image.std() > 8
        assert (image.max(2) - image.min(2) > 40).mean() > 0.003  # colours, not only axes
        corner = image[2, 2].mean()
        assert corner > 240 if scheme == "light" else corner < 60


def test_no_figure_is_empty(driver: Any) -> None:
    show(driver, 1280, "dark")
    check_figures(driver, 1280, "dark", 5)


@pytest.fixture(scope="module")
def advice(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a recommendation among four methods, one of which is a probe, and a failed one."""
    folder = tmp_path_factory.mktemp("advice")
    runs = {PROBE: near(82.1), LORA: near(92.2), HIRA: near(91.9), FULL: near(92.5)}
    return write(stored(folder / "sweep", runs, {"DoRA": "out of memory"}), folder, 1.0, COMMANDS).as_uri()


@pytest.mark.parametrize(
    ("width", "scheme"), marked(product([390, 1280], ["light", "dark"]), lambda row: row == (390, "light"))
)
def test_a_recommendation_can_be_read(driver: Any, advice: str, width: int, scheme: str) -> None:
    show(driver, width, scheme, advice)
    check_layout(driver, width)
    check_figures(driver, width, scheme, 2)
    sentence = driver.find_element("css selector", "#short > h2 + p")
    assert sentence.text.startswith("Take LoRA: it is ") and sentence.is_displayed()
    assert sentence.location["y"] + sentence.size["height"] < 900, "on the first screen"
    size, page, ink = driver.execute_script("""
    const [own, body] = [arguments[0], document.body].map(node => getComputedStyle(node));
    return [own.fontSize, body.backgroundColor, own.color];
    """, sentence)  # fmt: skip
    colors = [[int(part) for part in color[4:-1].split(",")] for color in (page, ink)]
    assert float(size.removesuffix("px")) >= 16 and contrast(*colors) > 7
    found = driver.execute_script("""
    const cells = [...document.querySelectorAll("#confusion-matrix td.tint")];
    return cells.map(cell => getComputedStyle(cell).backgroundColor);
    """)
    shades = [[float(part) for part in color[5:-1].split(",")] for color in found]
    mixed = [[part * own + (1 - part) * below for own, below in zip(shade, colors[0], strict=True)]
             for *shade, part in shades]  # fmt: skip
    assert len(mixed) >= 5 and min(contrast(shade, colors[1]) for shade in mixed) > 4.5, "numbers on their shade"


def test_headers_stay_and_no_table_is_stretched_or_cut(driver: Any) -> None:
    """The first column while a wide table is scrolled aside, the header while the page is scrolled past a table."""
    place = """
    const frame = document.querySelector(arguments[0]).parentElement;
    frame.scrollLeft = 100;
    const body = frame.querySelector("tbody").getBoundingClientRect();
    scrollTo(0, scrollY + body.top + 20);
    const [head, name] = ["thead th:nth-child(2)", "tbody th"].map(kind => frame.querySelector(kind));
    return [frame.classList.contains("fits"), head.getBoundingClientRect().top,
      name.getBoundingClientRect().left - frame.getBoundingClientRect().left];
    """
    show(driver, 1280)
    fits, top, left = driver.execute_script(place, "#matrix-clip-vit-b-32")
    assert fits and 0 <= top <= 2 and 0 <= left <= 2
    found = driver.execute_script("""
    return [...document.querySelectorAll(".scroll")].map(box => [box.scrollHeight - box.clientHeight,
      box.clientWidth - box.querySelector("table").offsetWidth]);
    """)
    assert len(found) > 8 and all(cut <= 0 and stretched <= 1 for cut, stretched in found)
    show(driver, 390)
    fits, _, left = driver.execute_script(place, "#accuracy-clip-vit-b-32")
    assert not fits and 0 <= left <= 2


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.full), "dark"])
def test_differences_are_coloured_and_can_be_read(driver: Any, scheme: str) -> None:
    show(driver, 1280, scheme)
    found = driver.execute_script("""
    return [...document.querySelectorAll("td.tint")].map(cell => [Number(cell.dataset.sort),
      getComputedStyle(cell).backgroundColor, getComputedStyle(document.body).backgroundColor]);
    """)
    strengths = {}
    for value, colour, page in found:
        red, _, blue, part = (float(number) for number in colour[5:-1].split(","))
        assert (blue > red) == (value > 0) and 0 <= part <= 0.7
        strengths[abs(value)] = part
        mixed = [part * shade + (1 - part) * float(page[4:-1].split(",")[0]) for shade in (red, blue)]
        assert min(mixed) > 60 if scheme == "light" else max(mixed) < 170
    assert len(found) > 40 and [strengths[value] for value in sorted(strengths)] == sorted(strengths.values())


def test_tables_are_sorted_by_a_click(driver: Any) -> None:
    show(driver, 1280)
    column = """
    const table = document.querySelector("#accuracy-clip-vit-l-14"), n = arguments[0];
    return [...table.tBodies[0].rows].map(row => [row.cells[n].dataset.sort ?? null, row.cells[0].textContent]);
    """
    heads = driver.find_elements("css selector", "#accuracy-clip-vit-l-14 thead button")
    number = [head.text for head in heads].index("eurosat")
    planned = driver.execute_script(column, number)

    def click() -> list[float | None]:
        driver.execute_script("arguments[0].click()", heads[number])
        return [None if value is None else float(value) for value, _ in driver.execute_script(column, number)]

    down, up = click(), click()
    found = [value for value in down if value is not None]
    assert found == sorted(found, reverse=True) and len(found) == len(down) - 1
    assert down[-1] is None and up[-1] is None and up[:-1] == found[::-1]  # what has no result comes last
    state = driver.find_elements("css selector", "#accuracy-clip-vit-l-14 thead th")[number].get_attribute("aria-sort")
    assert state == "ascending"
    click()
    assert driver.execute_script(column, number) == planned
