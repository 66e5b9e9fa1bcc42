"""The page about your own method or task is true: its module, commands and code run here in their order."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import joined
from tests.support.cli import Run
from tests.test_readme import ROOT, SHORT

TEXT = (ROOT / "docs" / "own_methods.md").read_text(encoding="utf-8")
MODULE, IN_PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
COMMANDS = [line for body in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S) for line in joined(body)]


@pytest.mark.slow
def test_everything_on_the_page(run: Run, own: Callable[[], None]) -> None:
    Path("mine.py").write_text(MODULE)
    for command in COMMANDS:
        _, verb, *words = shlex.split(command)
        short = {"fit": SHORT, "test": ("--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu")}
        result = run(verb, *words, *short.get(verb, ()))
        assert result.code == 0, (command, result.err)
        if verb == "fit":
            assert "Training FocalTask" in result.out and "--import mine" in result.out.partition("Next:")[2]
        own()
    config = json.loads(Path("runs/mine/latest/adapter/adapter_config.json").read_text())
    assert (config["method"], config["metadata"]["task_class"]) == ("mine.RankOne", "mine.FocalTask")
    sys.path.append(str(Path.cwd()))
    names: dict[str, Any] = {}
    exec(IN_PYTHON, names)
    assert names["task"].gamma == 1.5 and names["task"].adapter.scale == 2
