"""The Python on the written pages runs as pasted, block after block."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_pl.language.chat import read_conversations
from randlora_pl.language.prompt_sets import read_training
from tests.docs.pages import PAGES, ROOT
from tests.support.products import marked

NEEDS = {
    "python": (),
    "from_peft": ("peft",),
    "methods/autolora": (),
    "methods/galore": (),
}
"""Pages with blocks of Python, and the packages that these need."""


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[f"docs/{page}.md"], flags=re.S)


@pytest.mark.parametrize(
    ("page",), marked(zip(NEEDS), lambda row: row[0] not in ("python", "from_peft"), pytest.mark.slow)
)
def test_blocks_run_in_their_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS[page]:
        pytest.importorskip(package, reason=f"the page needs {package}")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    names: dict[str, Any] = {"__name__": page}
    try:
        for number, block in enumerate(blocks_of(page), 1):
            exec(compile(block, f"{page}.md, block {number}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    assert not any(re.match(r"\.\.\.", line) for block in blocks_of(page) for line in block.splitlines())


def test_packed_attention_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="the page is about PEFT")
    (block,) = blocks_of("packed_attention")
    (shown,) = re.findall(r"```text\n(.*?)```", PAGES["docs/packed_attention.md"], flags=re.S)
    exec(compile(block, "packed_attention.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_a_file_of_instructions_becomes_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("MINE").mkdir()
    samples = [{"instruction": "Add.", "input": "2 and 2", "output": "4"}, {"instruction": "Greet.", "output": "Hello"}]
    Path("alpaca.json").write_text(json.dumps(samples))
    exec(compile(next(block for block in blocks_of("prompts") if "alpaca" in block), "prompts.md", "exec"), {})
    written, _ = read_training("jsonl", Path("MINE"), 0)
    assert written == [("Add.\n2 and 2\n", "4"), ("Greet.\n", "Hello")]


def test_the_forty_chats_are_conversations() -> None:
    assert len(read_conversations(ROOT / "docs" / "ferry", "train")) == 40


def test_the_extras_are_those_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| (`.*?`) \| ", PAGES["docs/install.md"].partition("## Extras")[2], flags=re.M)
    shown = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert shown == settings["project"]["optional-dependencies"].keys()
