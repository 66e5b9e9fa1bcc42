"""The site in a headless Chromium: nothing is cut off, dark plots, and a search finds the page of that name first."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_site import SEARCHED
from tests.support.browser import NEEDED, opened_browser, set_screen

pytestmark = [
    pytest.mark.slow,  # every page at two widths; a minute
    NEEDED,
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[str]:
    """The address of the site: a search needs a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with opened_browser() as opened:
        yield opened


def look(driver: Any, width: int, scheme: str = "light") -> None:
    set_screen(driver, width, 1000, scheme)


WIDE = "return document.documentElement.scrollWidth - window.innerWidth"
CUT = """return [...document.querySelectorAll("pre > code")].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => e.textContent.slice(0, 80))"""


@pytest.mark.parametrize("width", [1440, 400])
def test_no_page_and_no_code_is_cut_off(site: Path, server: str, driver: Any, width: int) -> None:
    look(driver, width)
    found = {}
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        if "results" in path.parts and name.endswith("index.html"):
            continue  # a page of its own, with its own tests
        driver.get(f"{server}/{name}")
        found[name] = [driver.execute_script(WIDE), driver.execute_script(CUT) if width > 1000 else []]
    assert {name: facts for name, facts in found.items() if facts[0] > 0 or facts[1]} == {}
    assert len(found) > 30


def test_plots_are_dark_where_the_page_is(server: str, driver: Any) -> None:
    style = "return getComputedStyle(document.querySelector('img[src$=\"spectrum.png\"]')).filter"
    for scheme, dark in (("light", False), ("dark", True)):
        look(driver, 1440, scheme)
        driver.get(f"{server}/analyses.html")
        driver.execute_script("localStorage.clear()")  # the choice of the visit before
        driver.refresh()
        assert ("invert" in driver.execute_script(style)) == dark, scheme


@pytest.mark.parametrize("word", ["memory", "multi-node"])
def test_a_search_finds_the_page_of_that_name_first(server: str, driver: Any, word: str) -> None:
    look(driver, 1440)
    driver.get(f"{server}/index.html")
    driver.execute_script("const s = document.querySelector('#__search'); s.checked = true; "
                          "s.dispatchEvent(new Event('change'))")  # fmt: skip
    driver.find_element("css selector", "[data-md-component=search-query]").send_keys(word)
    hits: list[Any] = []
    for _ in range(40):
        hits = driver.find_elements("css selector", ".md-search-result__item > a")
        if hits:
            break
        time.sleep(0.25)
    assert hits and hits[0].get_attribute("href").startswith(f"{server}/{SEARCHED[word]}.html"), word
