"""The whole report: Markdown, HTML and CSV say the same, and everything is escaped."""

import csv
import html
import html.parser
import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from unittest.mock import Mock

import pytest

from randlora_pl.lab.report import Document, Picture, Section, Table, TableCell, markdown
from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import build, write_report
from randlora_pl.lab.report.files import html as to_html
from randlora_pl.utils.errors import UserError
from tests.lab.report.sweeps import METHODS, MODELS, description, write_sweep

SIZES = ("b-32", "l-14")
B32 = "CLIP-ViT-B/32"
SMALL = description(
    models={B32: MODELS[B32]}, datasets=["cars", "dtd"], budgets=[1],
    methods={m: METHODS[m] for m in ("LoRA-32", "RandLoRA-6")},
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Counts tags and identifiers, and follows what is opened and closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href"):
                self.links.append(value or "")
        if tag not in ("meta", "br", "wbr"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "index.html").read_text(encoding="utf-8"))


def test_files(report: Path) -> None:
    names = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    figures = ["parameters-clip", *(f"{kind}-clip-vit-{size}" for kind in ("differences", "memory") for size in SIZES)]
    assert names == {
        *("index.html", "report.md", "cells.csv", "summary.csv", "sweep.yaml"),
        *(f"figures/{name}.{form}" for name in figures for form in ("png", "svg")),
    }


def test_the_page_is_whole_and_needs_nothing_else(report: Path, page: Page) -> None:
    assert not page.stack
    assert page.tags["svg"] == 5 and page.tags["h1"] == page.tags["main"] == page.tags["nav"] == 1
    assert not [tag for tag in ("link", "img", "iframe", "object") if page.tags[tag]]
    assert not [value for tag, name, value in page.attributes if name == "src"]
    assert all(link.startswith("#") for link in page.links)
    assert len(set(page.ids)) == len(page.ids) and {link[1:] for link in page.links} <= set(page.ids)
    named = {name for _, key, value in page.attributes if key == "aria-labelledby" for name in value.split()}
    assert named and named <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", (report / "index.html").read_text(encoding="utf-8"))) <= set(page.ids)


def test_accessible(page: Page) -> None:
    assert ("html", "lang", "en") in page.attributes
    assert page.tags["th"] == len([1 for tag, name, _ in page.attributes if (tag, name) == ("th", "scope")])
    roles = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "role")]
    assert roles == ["img"] * 5
    scrolled = [value for tag, name, value in page.attributes if (tag, name) == ("div", "tabindex")]
    assert len(scrolled) == page.tags["table"]


def test_every_run_is_in_the_csv_and_in_a_tooltip(sweep: Sweep, report: Path) -> None:
    rows = list(csv.DictReader((report / "cells.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(sweep.cells)
    shown = (report / "index.html").read_text(encoding="utf-8")
    for seed, accuracy in sweep.finished[["seed", "accuracy"]][::29].itertuples(index=False):
        assert f"seed {seed}: {accuracy:.2f}" in shown, "in a tooltip"
    by_cell = {row["cell"]: row for row in rows if row["cell"]}
    for run in sweep.finished[::17].to_dict("records"):
        row = by_cell[run["cell"]]
        assert all(row[name] == str(run[name]) for name in ("model", "dataset", "budget", "method", "seed", "state"))
        assert all(float(row[name]) == pytest.approx(run[name], rel=1e-5) for name in ("accuracy", "fit_seconds"))
    missing = [row for row in rows if row["state"] != "finished"]
    assert len(missing) == 13 and all(not row["accuracy"] for row in missing)


def test_summary(sweep: Sweep, report: Path) -> None:
    rows = list(csv.DictReader((report / "summary.csv").read_text(encoding="utf-8").splitlines()))
    for row in rows:
        if row["dataset"] != "(average)":
            values = sweep.by_seed(Key(row["model"], row["dataset"], row["budget"], row["method"]))
            assert bool(row["mean"]) == bool(values) and (not values or row["state"] == "finished")
            assert not values or float(row["mean"]) == pytest.approx(fmean(values.values()), rel=1e-5)
            if row["paper"] and values:
                assert float(row["difference"]) == pytest.approx(float(row["mean"]) - float(row["paper"]), abs=2e-3)
    averages = [row for row in rows if row["dataset"] == "(average)"]
    assert len(averages) == 2 * (4 * 6 + 1)
    (row,) = [r for r in averages if (r["model"], r["budget"], r["method"]) == (B32, "16-shot", "LoRA-32")]
    assert row["datasets"] == "cars dtd eurosat flowers102" and row["ci95"] and row["paper"]


def test_markdown_has_tables_of_equal_width_and_all_footnotes(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(blocks) >= 10
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1, block[0]
    used = set(re.findall(r"(?<!^)\[\^(\d+)\](?!:)", text, flags=re.M))
    assert used == set(re.findall(r"^\[\^(\d+)\]:", text, flags=re.M)) and "1" in used
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (report / name).is_file()
    for words in ("not run", "failed: CUDA out of memory", "2 of 3 seeds", "no finished run of NoLA"):
        assert words in text


def test_known_inconsistencies_are_footnoted_and_nothing_of_the_machine_is_written(report: Path, folder: Path) -> None:
    for name in ("report.md", "index.html"):
        text = (report / name).read_text(encoding="utf-8")
        for words in ("is not the same: LoRA-32 trains", "rank 10; the text and", "12 epochs", "no gradient", "ln 100"):
            assert words in text, (name, words)
    for path in report.rglob("*"):
        if path.suffix in (".md", ".html", ".csv", ".svg"):
            assert str(folder.parent) not in path.read_text(encoding="utf-8")


def test_what_is_shown_is_escaped() -> None:
    evil = "<script>alert(1)</script> a|b *c* _d_ `e` [f](g)"
    table = Table("t", evil, [TableCell(evil)], [[TableCell(evil, below=evil, title='"><b>')]], below=[evil])
    document = Document(evil, evil, [Section("s", evil, [evil], [evil], [table])], [(1, evil, evil)])
    plotted = markdown(Document("", "", [Section("s", "", parts=[Picture("p", evil, evil, None)])], []), "figures")
    (drawn,) = [line for line in plotted.splitlines() if line.startswith("![")]
    assert "\\<script>" in drawn and drawn.endswith("(figures/p.png)") and drawn.count("]") == 1
    page = to_html(document, {})
    assert "<script>alert" not in page and '"><b>' not in page
    assert not Page(page).stack
    text = markdown(document)
    (row,) = [line for line in text.splitlines() if line.startswith("| \\<script>") and "<br>" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 2 and "\\*c\\*" in text and "\\[f](g)" in text


@pytest.mark.usefixtures("undrawn")
def test_labels_that_look_alike_have_their_own_figures(tmp_path: Path) -> None:
    models = {"ViT-B/32": {}, "ViT-B-32": {}, "模型": {}, "型号": {}, "x" * 300: {}}
    sweep = read_sweep(
        write_sweep(tmp_path / "sweep", SMALL | {"models": models, "seeds": [1], "paper": None}, zeroshot=False)
    )
    made = write_report(sweep, tmp_path / "report")
    drawn = [file.name for file in made if file.name.startswith("differences-") and file.suffix == ".png"]
    assert len(set(drawn)) == len(models) and {f"differences-vit-b-32{end}.png" for end in ("", "-2")} <= set(drawn)
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert len(set(page.ids)) == len(page.ids)


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    methods = {"$r$ of $\\alpha_$": {"adapter": "LoRA"}, "RandLoRA-6": {"adapter": "RandLoRA"}}
    folder = write_sweep(tmp_path / "sweep", SMALL | {"methods": methods, "paper": None}, zeroshot=False)
    files = write_report(read_sweep(folder), tmp_path / "report")
    assert any(file.suffix == ".svg" for file in files)


def test_a_report_without_the_paper(tmp_path: Path) -> None:
    document = build(read_sweep(write_sweep(tmp_path, SMALL | {"paper": None, "notes": ["A remark on the runs."]})))
    assert document.sections[0].points[0] == "A remark on the runs."
    assert document.footnotes == [] and "paper " not in markdown(document).replace("the paper", "")


@pytest.mark.parametrize(
    ("paper", "said", "unsaid"),
    [
        ({"tables": [11]}, "over the same datasets", "all 22"),
        ({"tables": [2]}, "Table 2 has averages over all 22 datasets only", "over the same datasets"),
        ({"tables": [10]}, "Table 10 has no accuracies", "over the same datasets"),
        ({"figure": 4}, "The paper gives Figure 4 as a drawing only", "over the same datasets"),
    ],
)
def test_what_stands_beside_is_told(tmp_path: Path, paper: object, said: str, unsaid: str) -> None:
    text = markdown(build(read_sweep(write_sweep(tmp_path, SMALL | {"paper": paper, "seeds": [1]}))))
    assert said in text and unsaid not in text and "\n- One seed gives no confidence intervals" in text


@pytest.mark.usefixtures("undrawn")
def test_the_report_ends_with_how_it_was_made(tmp_path: Path) -> None:
    known = {"machine": "Linux-x86_64", "cpu_threads": 2, "version/torch": "2.9.1", "version/python": "3.12.1"}
    sweep = read_sweep(write_sweep(tmp_path / "sweep", SMALL | {"paper": None}, more=lambda labels: known))
    write_report(sweep, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    made = text.partition("## How this was made\n")[2]
    runs = "device cuda; machine Linux-x86\\_64; CPU threads 2; randlora-pl 0.1.0; commit 0123456789; "
    assert made.strip().startswith(f"- The runs: {runs}PyTorch 2.9.1; Python 3.12.1.")
    (block,) = re.findall(r"```sh\n(.*?)```", made, flags=re.S)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert f"<pre>{block.strip()}</pre>" in html.unescape(page)
    commands = [line for line in block.splitlines() if not line.startswith("#")]
    assert commands == ["randlora-pl report . --output again", "randlora-pl sweep sweep.yaml"]


@pytest.mark.usefixtures("undrawn")
def test_overwriting(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "sweep", SMALL))
    output = tmp_path / "out"
    write_report(sweep, output)
    (output / "mine.txt").write_text("kept")
    (output / "figures" / "memory-gone.png").write_text("of an older report")
    first = (output / "index.html").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        write_report(sweep, output)
    write_report(sweep, output, overwrite=True)
    assert (output / "index.html").read_bytes() == first
    assert (output / "mine.txt").read_text() == "kept" and not (output / "figures" / "memory-gone.png").exists()
    assert not list(output.glob(".part*"))


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read_sweep(write_sweep(tmp_path / "sweep", SMALL))

    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="written"):
        write_report(sweep, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give a folder"):
        write_report(sweep, tmp_path / "file")
