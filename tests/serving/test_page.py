"""The page in headless Chromium: a real digit is chosen, dropped, and refused."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.serving import pictures
from tests.serving.conftest import NAMES
from tests.serving.folder import write
from tests.serving.server import Running
from tests.support.browser import NEEDED, contrast, opened_browser

pytestmark = [NEEDED, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    nothing_else_is_asked = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with opened_browser("--window-size=900,900", nothing_else_is_asked) as opened:
        yield opened


@pytest.fixture
def page(browser: Any, server: Running) -> Any:
    browser.get(f"http://127.0.0.1:{server.port}/")
    until(browser, lambda: "RandLoRA" in text(browser, "model"))
    return browser


def until(browser: Any, condition: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


def text(page: Any, name: str) -> str:
    """The text of an element, also of one that only screen readers see."""
    return str(page.find_element("id", name).get_property("textContent")).strip()


def choose(page: Any, file: Path) -> None:
    page.find_element("id", "choose").send_keys(str(file))


def drop(page: Any, content: bytes, name: str) -> None:
    """What the browser does when a file is let go over the page."""
    script = """
    const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
    const data = new DataTransfer();
    if (arguments[1]) data.items.add(new File([bytes], arguments[1]));
    for (const kind of ["dragenter", "dragover", "drop"])
      document.getElementById("drop").dispatchEvent(
        new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
    """
    page.execute_script(script, base64.b64encode(content).decode(), name)


def bars(page: Any) -> list[tuple[str, str, float]]:
    """Name, percentage in words, and width of the bar as a share of its track, of each class shown."""
    script = """
    const width = (element) => element.getBoundingClientRect().width;
    return [...document.querySelectorAll("#bars li")].map((li) => {
      const [name, share, bar, track] = ["name", "share", "bar", "track"].map((kind) => li.querySelector("." + kind));
      return [name.innerText, share.innerText, width(bar) / width(track)];
    });
    """
    return [(name, share, width) for name, share, width in page.execute_script(script)]


def check_bars(page: Any, server: Running, content: bytes) -> None:
    """Names, percentages and widths are those of the API."""
    expected = server.classify(content)[1]["classes"]
    until(page, lambda: text(page, "status").startswith(f"Most likely: {expected[0]['name']}"))
    shown = bars(page)
    assert [name for name, _, _ in shown] == [entry["name"] for entry in expected] and len(shown) == 5
    for (_, share, width), entry in zip(shown, expected, strict=True):
        assert share == f"{100 * entry['probability']:.1f} %"
        assert width == pytest.approx(entry["probability"], abs=0.005)
    assert text(page, "error") == ""


def test_a_digit_is_chosen(page: Any, server: Running, digit: bytes, tmp_path: Path) -> None:
    file = tmp_path / "digit.png"
    file.write_bytes(digit)
    choose(page, file)
    check_bars(page, server, digit)
    assert text(page, "file") == "digit.png"
    until(page, lambda: page.execute_script("return document.getElementById('preview').naturalWidth") == 8)
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        ink, ground = ([int(part) for part in value[4:-1].split(",")] for value in page.execute_script(colours))
        assert contrast(ink, ground) > 7  # level AAA
        assert (ground > ink) == (scheme == "light")
        assert page.save_screenshot(str(tmp_path / f"{scheme}.png"))
    assert not [line for line in page.get_log("browser") if line["level"] == "SEVERE"]


def test_errors_are_shown_and_the_next_image_works(page: Any, server: Running, digit: bytes) -> None:
    bad = pictures.bad()
    for content, name, part in (
        (b"hello", "notes.txt", "notes.txt: not an image"),
        (bad["cut JPEG"][0], "cut.jpg", "cut.jpg: The image that was sent cannot be read"),
        (bad["bomb of 200 megapixels"][0], "bomb.png", "bomb.png: the image has 20000 x 10000 = 200,000,000 pixels"),
        (bytes(2_100_000), "big.bin", "big.bin has 2.1 MB, but at most 2 MB are allowed."),
        (b"", "", "This is not a file"),
    ):
        drop(page, content, name)
        until(page, lambda part=part: part in text(page, "error"))
        assert not page.find_element("id", "result").is_displayed()
        assert page.find_element("id", "error").get_attribute("role") == "alert"
    for content, name in ((digit, "digit.png"), (pictures.good()["colour.jpg"], "colour.jpg")):
        drop(page, content, name)
        until(page, lambda name=name: text(page, "file") == name)
        check_bars(page, server, content)


def test_the_keyboard_reaches_the_choice(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.find_element("tag name", "body").send_keys(Keys.TAB)
    focused = page.switch_to.active_element
    assert focused.get_attribute("id") == "choose"
    assert page.execute_script("return getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    assert focused.accessible_name.startswith("Drop, paste or choose an image (up to 2 MB)")


def test_a_narrow_window_needs_no_scrolling_aside(page: Any, digit: bytes) -> None:
    page.set_window_size(500, 800)
    drop(page, digit, "a-rather-long-name-of-an-image-file-" * 4 + ".png")
    until(page, lambda: page.find_element("id", "result").is_displayed())
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_sample_is_tried_with_other_numbers_of_classes(page: Any, server: Running) -> None:
    until(page, lambda: len(page.find_elements("css selector", "#samples button")) == 10)
    buttons = page.find_elements("css selector", "#samples button")
    assert [button.text for button in buttons] == NAMES
    widths = "return [...document.querySelectorAll('#samples img')].map((image) => image.naturalWidth)"
    until(page, lambda: page.execute_script(widths) == [8] * 10)
    buttons[3].click()
    check_bars(page, server, server.fetch("/samples/three.png"))
    for choice, count in (("1", 1), ("3", 3), ("all 10", 10)):
        page.find_element("xpath", f"//option[.='{choice}']").click()
        until(page, lambda count=count: len(bars(page)) == count and text(page, "status").startswith("Most"))
    names = page.execute_script("return [...document.querySelectorAll('#classes li')].map((item) => item.textContent)")
    assert names == NAMES and text(page, "classes").startswith("10 classes")
    assert page.find_element("css selector", "#classes li").is_displayed()  # a short list is open


def test_the_command_line_and_the_answer_are_those_of_the_request(
    page: Any, server: Running, digit: bytes, tmp_path: Path
) -> None:
    """They are run by bash, also for file names that mean something to a shell or to curl."""
    for name in ("plain.png", 'it\'s a; "$HOME", $(false) \\.png', "three.png"):
        if name == "three.png":
            until(page, lambda: len(page.find_elements("css selector", "#samples button")) == 10)
            page.find_elements("css selector", "#samples button")[3].click()
        else:
            (tmp_path / name).write_bytes(digit)
            drop(page, digit, name)
        until(page, lambda name=name: text(page, "file") == name and name[:2] in text(page, "curl"))
        done = subprocess.run(["bash", "-c", text(page, "curl")], cwd=tmp_path, capture_output=True, text=True)
        assert json.loads(done.stdout) == json.loads(text(page, "json")), done.stderr
    page.find_element("css selector", "#request summary").click()
    button = page.find_element("css selector", "#json + button")
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    button.click()
    until(page, lambda: button.text == "Copied")
    assert page.execute_script("return navigator.clipboard.readText()") == text(page, "json")


@pytest.mark.slow
def test_the_token_is_asked_for_until_it_is_right(browser: Any, adapter: Path, digit: bytes, tmp_path: Path) -> None:
    from selenium.webdriver.support.expected_conditions import alert_is_present
    from selenium.webdriver.support.ui import WebDriverWait

    server = Running(adapter, tmp_path / "log", "--token", "secret").wait()
    try:
        browser.get(f"http://127.0.0.1:{server.port}/")
        for token in ("wrong", "wröng", "secret"):
            drop(browser, digit, "digit.png")
            question = WebDriverWait(browser, 30).until(alert_is_present())
            question.send_keys(token)
            question.accept()
            until(browser, lambda: text(browser, "error") or text(browser, "status").startswith("Most likely"))
            assert ("token" in text(browser, "error")) == (token != "secret")
        assert "RandLoRA" in text(browser, "model")
        browser.refresh()  # the tab remembers it
        until(browser, lambda: "RandLoRA" in text(browser, "model"))
    finally:
        server.kill()


@pytest.mark.slow  # another server; test_many.py has the requests
def test_one_of_several_adapters_is_chosen(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import Select

    names = ["cars & 'more'", "pets"]
    for name in names:
        write(tmp_path / "adapters" / name, "pets" if name == "pets" else "cars")
    running = Running(None, tmp_path / "log", "--adapters", "adapters")
    content = pictures.encode(pictures.photo(40, 50), "PNG")
    try:
        browser.get(f"http://127.0.0.1:{running.wait().port}/")
        until(browser, lambda: text(browser, "model"))
        assert "RandLoRA" not in text(browser, "model") and not browser.find_element("id", "classes").is_displayed()
        chosen = browser.find_element("id", "adapter")
        assert chosen.is_displayed() and chosen.text.split("\n") == names
        drop(browser, content, "photo.png")
        for name in names:
            Select(chosen).select_by_visible_text(name)
            expected = running.classify(content, f"?adapter={quote(name, safe='')}")[1]["classes"]
            until(browser, lambda: [each for each, *_ in bars(browser)] == [entry["name"] for entry in expected])  # noqa: B023
            command = text(browser, "curl").replace("image=@photo.png", f"image=@{tmp_path / 'photo.png'}")
            (tmp_path / "photo.png").write_bytes(content)
            printed = subprocess.run(["bash", "-c", f"{command} -s"], capture_output=True, text=True, check=True).stdout
            assert json.loads(printed)["classes"] == expected
    finally:
        running.kill()
