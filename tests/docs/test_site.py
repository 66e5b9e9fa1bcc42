"""The site builds without a complaint and a network, holds every page, and fetches nothing from elsewhere."""

import html
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from randlora_pl.commands.main import COMMANDS
from randlora_pl.data.catalog import CATALOG
from randlora_pl.models.catalog import MODELS
from randlora_pl.run.options.classes import classes, options_of
from tests.docs.pages import DOCS, MADE, PAGES, RESULTS, ROOT
from tests.support.products import in_one_item


def pages_of(site: Path) -> set[str]:
    return {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}


def entries_of(site: Path) -> list[dict[str, Any]]:
    """The pages and sections that a search finds."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    return list(index["docs"])


def test_every_page_is_built(site: Path) -> None:
    written = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    report = {f"results/{name}/index" for name in RESULTS}  # pages of their own, written by `report`
    assert pages_of(site) == written | notebooks | MADE | report | {"404"}
    assert {entry["location"].partition("#")[0] for entry in entries_of(site)} >= {f"{name}.html" for name in written}


def test_public_names_have_their_docstrings_on_the_site(site: Path) -> None:
    for package in sorted(path.stem for path in (DOCS / "api").glob("*.md") if path.stem not in ("index", "top_level")):
        page = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
        for name in importlib.import_module(f"randlora_pl.{package}").__all__:
            assert f'id="randlora_pl.{package}.{name}"' in page, name
        assert ">>> " in re.sub("<[^>]+>", "", html.unescape(page)), package
    assert 'id="randlora_pl.fit"' in (site / "api" / "top_level.html").read_text(encoding="utf-8")


@in_one_item("method", list(classes("model.adapter")))
def test_method_is_used_in_three_ways(site: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = html.unescape((site / "methods" / f"{method.lower()}.html").read_text(encoding="utf-8"))
    assert re.findall(r'<label for="[^"]*">([^<]*)</label>', page) == ["Command line", "Config", "Python"]
    code = re.findall(r"<code>(.*?)</code></pre>", page, flags=re.S)
    exec(re.sub("<[^>]+>", "", code[-1]), {})
    assert "trainable" in capsys.readouterr().out


def test_made_pages_say_what_the_program_says(site: Path) -> None:
    text = {name: html.unescape((site / f"{name}.html").read_text(encoding="utf-8")) for name in MADE}
    for verb in COMMANDS:
        assert f"randlora-pl {verb}\n" in re.sub("<[^>]+>", "\n", text["command_options"]), verb
    for option in ("--model.targets", "--model.adapter.basis", "--data.shots", "--checkpoint.patience", "--run.logger"):
        assert f"<code>{option}</code>" in text["config_keys"], option
    assert all(f"<code>{name}</code>" in text["datasets"] for name in CATALOG)
    assert all(f"<code>{row.name}</code>" in text["models"] for row in MODELS)


def test_a_page_of_a_method_has_options_rates_and_config(site: Path) -> None:
    for name, kind in classes("model.adapter").items():
        page = html.unescape((site / "methods" / f"{name.lower()}.html").read_text(encoding="utf-8"))
        assert f"{name}\n" in re.sub("<[^>]+>", "\n", page) and "<math" in page, name
        for option in options_of(kind):
            assert f"<code>--model.adapter.{option}</code>" in page, (name, option)
    page = (site / "methods" / "lora.html").read_text(encoding="utf-8")
    assert "0.001 for both towers of a CLIP and 0.01 for an image tower" in page
    for name, parts in {"lora": ("6.9 M parameters on CLIP", "LoRA-32 took 0."), "vera": ("0.14 M",)}.items():
        page = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        assert all(part in page for part in parts), name


SEARCHED = {
    "api": "api/index",
    "install": "install",
    "citation": "citation",
    "wandb": "logging",
    "mlflow": "logging",
    "qlora": "prompts",
    "peft": "compared_with_peft",
    "multi-node": "many_devices",
    "slurm": "many_devices",
    "python": "python",
    "lora": "methods/lora",
    "memory": "troubleshooting",
    "imbalanced": "faq",
    "gguf": "faq",
}
"""Words, and the page that a search finds first; `test_site_browser` types some of them."""


@in_one_item(("word", "name"), SEARCHED.items())
def test_a_search_finds_the_page_of_that_name(site: Path, word: str, name: str) -> None:
    """Tags count a thousand times as much as titles: the page that has the word as a tag comes first."""
    entries = entries_of(site)
    (first,) = {entry["location"].partition("#")[0] for entry in entries if word in entry.get("tags", ())}
    assert first == f"{name}.html"
    titles = [entry["title"] for entry in entries if entry["location"].partition("#")[0] == first]
    assert any(word in title.lower() for title in titles), titles


def test_results_come_last_in_a_search(site: Path) -> None:
    boosts = {entry["location"].partition("#")[0]: entry.get("boost", 1) for entry in entries_of(site)}
    pages = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.glob("results/**/*.md")}
    assert {name for name, boost in boosts.items() if boost == 0.5} == pages


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_notebook_has_plots_if_it_ran(runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbconvert", reason='the site needs the extra: pip install ".[docs]"')
    monkeypatch.syspath_prepend(ROOT / "scripts" / "site")
    draw = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nprint(6 * 7)"
    cells = [nbformat.v4.new_markdown_cell("# Title\n[data](../docs/x.md)"), nbformat.v4.new_code_cell(draw)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "small.ipynb")
    page = importlib.import_module("notebooks").page
    text, plots = page(tmp_path / "small.ipynb", runs)
    assert text.startswith("# Title\n") and "[data](../x.md)" in text
    assert ("42" in text) == runs == ("without running" not in text)
    assert len(plots) == runs
    for name, plot in plots.items():
        assert f"]({name})" in text and plot.startswith(b"\x89PNG")


def test_the_variables_are_those_that_the_program_reads() -> None:
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        found |= set(re.findall(r"[\"'](RANDLORA_[A-Z_]+)[\"']", path.read_text(encoding="utf-8")))
    own = ("RUN_FOLDER", "FROM_ADAPTER", "SWEEP_PARENT")  # between the program's processes
    internal = {f"RANDLORA_PL_{name}" for name in own}
    assert set(re.findall(r"`(RANDLORA_[A-Z_]+)`", PAGES["docs/reference.md"])) == found - internal


def test_pages_fetch_nothing_and_leave_equations_to_the_browser(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", page)
        fetched += re.findall(r"<link\b(?![^>]*rel=[\"']?(?:canonical|next|prev))[^>]*\bhref=[\"']?([^\"'\s>]+)", page)
        assert fetched or "results" in path.parts
        assert not [each for each in fetched if re.match(r"(https?:)?//", each)], path.name
        assert "arithmatex" not in page and not re.search(r"<mtext>\\|\\\(|\\\[", page), path.name
        if path.stem in ("security", "python", "many_devices"):  # remarks are set apart
            assert re.search(r'<div class="admonition (warning|tip|important)">', page) and "[!" not in page
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path.name


@pytest.mark.slow
def test_a_broken_link_would_fail(tmp_path: Path) -> None:
    pytest.importorskip("material", reason='the site needs the extra: pip install ".[docs]"')
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text) | {"nav": ["index.md", "other.md"], "hooks": []}
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Title\n[nowhere](other.md#no-such-heading)\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "no-such-heading" in done.stdout + done.stderr
