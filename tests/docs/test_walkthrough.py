"""The files from ``fit`` to ``loss.backward`` are the ones that `docs/walkthrough.md` lists."""

import json
import os
import re
import subprocess
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
    for file in re.findall(r"`([a-z_]+/[\w/]+\.py)`", page):
        assert (PACKAGE / file).is_file(), file


@pytest.mark.slow  # a process of its own, which imports everything again
def test_a_run_imports_the_files_that_it_uses(tmp_path: Path) -> None:
    """Other methods, tasks, readers, downloads and strategies stay out; the page has the number."""
    code = (
        "import json, sys; from randlora_pl.commands.main import main; assert main(sys.argv[1:]) == 0;"
        "names = [name for name, module in sys.modules.items() if not hasattr(module, '__path__')];"
        "print(json.dumps([name for name in names if name.startswith('randlora_pl.')]))"
    )
    words = [
        sys.executable,
        "-c",
        code,
        "fit",
        "--config",
        "quickstart",
        "--data.steps",
        "1",
        "--run.root",
        str(tmp_path),
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    )
    loaded = json.loads(done.stdout.strip().splitlines()[-1])
    page = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"imports (\d+) files", page)
    assert len(loaded) <= int(stated), sorted(loaded)
    assert not [name for name in loaded if re.search(r"text_head|linear_head|download|tar_|sharding", name)]
