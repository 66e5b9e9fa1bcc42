"""The way from ``fit`` to ``loss.backward`` is short, and `docs/walkthrough.md` lists it."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import randlora_pl
from randlora_pl.adapters.layers.adapted import AdaptedAttention, AdaptedLinear
from tests.docs.pages import ROOT
from tests.support.cli import SMALL, Run

PACKAGE = Path(randlora_pl.__file__).parent


def test_the_files_on_the_way_are_those_of_the_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: dict[str, set[str]] = {}

    def watch(owner: Any, name: str, event: str) -> None:
        plain = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if event not in stacks and torch.is_grad_enabled():
                frame, found = sys._getframe(), {Path(sys.modules[owner.__module__].__file__ or "")}
                while frame.f_back:
                    frame = frame.f_back
                    found.add(Path(frame.f_code.co_filename))
                stacks[event] = {file.relative_to(PACKAGE).as_posix() for file in found if PACKAGE in file.parents}
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(AdaptedLinear, "forward", "forward")
    watch(AdaptedAttention, "forward", "forward")
    watch(torch.Tensor, "backward", "backward")
    assert run("fit", *SMALL).code == 0
    files = stacks["forward"] | stacks["backward"]
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE)) == files
    assert len(files) <= 15 and sum(len((PACKAGE / file).read_text().splitlines()) for file in files) <= 3000
    for file in re.findall(r"`([a-z_]+/[\w/]+\.py)`", page):
        assert (PACKAGE / file).is_file(), file
