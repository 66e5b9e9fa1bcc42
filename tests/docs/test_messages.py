"""The messages on the page about trouble are those of the program."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from randlora_pl.commands.main import main
from randlora_pl.run.error_messages import memory_advice
from tests.docs.pages import PAGES, ROOT, shown
from tests.support.products import in_one_item

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
