"""The files that a value passes are the ones that `docs/walkthrough.md` lists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import randlora_pl
from tests.docs.pages import ROOT

PACKAGE = Path(randlora_pl.__file__).parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([\w/]+\.py)` \|", re.MULTILINE)
MOST = {"rank": 20, "picture": 34}
"""Files of each list. Lower them when files go."""


def listed(value: str) -> set[str]:
    return set(ROW.findall(PAGE.split("\n## ")[[*MOST].index(value) + 1]))


@pytest.mark.parametrize("value", MOST)
def test_the_lists_name_files_and_grow_no_longer(value: str) -> None:
    files = listed(value)
    assert 10 < len(files) <= MOST[value]
    assert not [file for file in files if not (PACKAGE / file).is_file()]


@pytest.mark.slow  # runs in processes of their own, each function of which is traced
@pytest.mark.parametrize("value", MOST)
def test_the_files_on_the_way_are_those_of_the_page(value: str, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "walk.py"), value]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(ROW.findall(done.stdout)) == listed(value)


@pytest.mark.slow  # a process of its own, which imports everything again
def test_a_run_imports_the_files_that_it_uses(tmp_path: Path) -> None:
    """Other methods, tasks, readers, downloads and strategies stay out; the page has the number."""
    code = (
        "import json, sys; from randlora_pl.commands.main import main; assert main(sys.argv[1:]) == 0;"
        "names = [name for name, module in sys.modules.items() if not hasattr(module, '__path__')];"
        "print(json.dumps([name for name in names if name.startswith('randlora_pl.')]))"
    )
    words = ["fit", "--config", "quickstart", "--data.steps", "1", "--run.root", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=environment
    )
    loaded = json.loads(done.stdout.strip().splitlines()[-1])
    (stated,) = re.findall(r"imports (\d+) files", PAGE)
    assert len(loaded) <= int(stated), sorted(loaded)
    assert not [name for name in loaded if re.search(r"text_head|linear_head|download|tar_", name)]
