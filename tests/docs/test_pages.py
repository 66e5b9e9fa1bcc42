"""Pages name what the program has: files, headings, methods, messages and keys of results."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from randlora_pl.commands.main import main
from randlora_pl.run.options.classes import classes
from randlora_pl.utils.errors import memory_advice
from randlora_pl.utils.run_files import read_results
from tests.docs.pages import DOCS, PAGES, ROOT, anchors_of, links_of, shown
from tests.support.cli import SMALL, Run
from tests.support.products import in_one_item


@in_one_item("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    pictures = re.findall(r'src(?:set)?="([^"]+)"', PAGES[page])
    for link in [*links_of(PAGES[page]), *pictures]:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{link}: on GitHub, too"
        if anchor and target.suffix == ".md":  # Material chooses pictures by `#only-light` and `#only-dark`
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_the_pages_link_to_each_other_only() -> None:
    """A link out of docs/ would be dead on the site."""
    for page, text in PAGES.items():
        for link in links_of(text) if page.startswith("docs/") else ():
            path = (ROOT / page).parent / link.partition("#")[0]
            assert link.startswith("https://") or path.resolve().is_relative_to(DOCS), link


def test_links_are_found() -> None:
    text = "# A b: c\n[x](method.md#a-b) `[y](z)`\n```text\n# not a heading\n[n](m)\n```\n## D\n"
    assert links_of(text) == ["method.md#a-b"] and anchors_of(text) == {"a-b-c", "d"}
    assert sum(len(links_of(page)) for page in PAGES.values()) > 50


GROUPS = {
    "fixed rank": ("Fixed rank", "fixed rank"),
    "full rank": ("Full rank", "full rank ([all methods](docs/methods/index.md))"),
    "whole": ("The whole model", "the whole model"),
    "optimizer": ("Optimizers", "the whole model, by an optimizer with less memory"),
}
"""Heading on the page of methods and row of the README, by group."""


def named(text: str) -> set[str]:
    return {re.sub("[^a-z]", "", name.lower()) for name in text.split(",")}


def test_every_method_is_in_its_group() -> None:
    groups = {name: getattr(kind, "group", "") for name, kind in classes("model.adapter").items()}
    assert set(groups.values()) == GROUPS.keys()
    for group, (heading, row) in GROUPS.items():
        methods = {name.lower() for name, own in groups.items() if own == group}
        section = PAGES["docs/methods/index.md"].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        assert set(re.findall(r"^\| \[[^]]*\]\((\w+)\.md\)", section, flags=re.M)) == methods
        (names,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", PAGES["README.md"], flags=re.M)
        assert named(names) == methods - {"frozen"}
    counted = len(groups) - 1  # `Frozen` updates nothing: it is the adapter beside learned prompts
    assert f"RandLoRA, LoRA, DoRA and {counted - 3} more methods" in PAGES["README.md"]
    assert f"| Methods | [{counted}](methods/index.md)" in PAGES["docs/compared_with_peft.md"]
    assert f">{counted} methods, compared fairly<" in (ROOT / "docs" / "hero.svg").read_text(encoding="utf-8")


PAGE = PAGES["docs/reference.md"].partition("\n## Environment variables\n")[0]


def test_keys_of_a_run_are_explained(run: Run, tmp_path: Path) -> None:
    named = {key for row in re.findall(r"^\| (`.*?`) \|", PAGE, flags=re.M) for key in re.findall(r"`(.*?)`", row)}
    groups = tuple(key.removesuffix("...") for key in named if key.endswith("..."))
    exact = {key for key in named if not key.endswith("...")}
    assert run("fit", *SMALL, "--checkpoint.patience", "5").code == 0
    (folder,) = tmp_path.glob("runs/*/2*")
    found = set(read_results(folder))
    assert not {key for key in found if key not in exact and not key.startswith(groups)}
    outside = {"git_commit", "git_changed"}  # of a checkout only
    assert not exact - outside - found
    assert all(any(key.startswith(group) for key in found) for group in groups)


TEXT = PAGES["docs/troubleshooting.md"]
TRIED = shown(TEXT)
TOLD = set(re.findall(r"```text\n(.*?)\n?```", TEXT, flags=re.S)) - {output.rstrip("\n") for _, output in TRIED}
SOURCE = re.sub(
    r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
)


@pytest.mark.parametrize(("command", "output"), TRIED)
def test_commands_fail_as_shown(
    command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "accelerator gpu" in command and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("there is a GPU here, so that this command would train")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    assert output in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/2*/config.yaml"))


@in_one_item("message", sorted(TOLD))
def test_other_messages_are_in_the_program(message: str) -> None:
    told = re.sub(r"^randlora-pl: error: |randlora-pl fit --resume …$|the loss is nan ", "", message)
    pieces = [
        piece.strip(" .,;()\n")
        for piece in re.split(r"…|[.;:,] | \(|has lost (?:a|another) | for the same |, or ", told)
    ]
    assert any(len(piece) > 12 for piece in pieces)
    for piece in pieces:
        assert piece in SOURCE, piece


def test_the_advice_on_memory() -> None:
    pattern = next(message for message in TOLD if "error: out of memory" in message).removeprefix(
        "randlora-pl: error: "
    )
    assert re.fullmatch(re.escape(pattern).replace("…", r"\d+"), memory_advice(128, 1, "fit", 256))


def test_they_are_found() -> None:
    assert len(TRIED) >= 6 and len(TOLD) >= 8
