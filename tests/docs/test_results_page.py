"""The page of `results.json` explains every key of a run."""

import re
from pathlib import Path

from randlora_pl.utils.run_files import read_results
from tests.docs.pages import PAGES
from tests.support.cli import SMALL, Run

PAGE = PAGES["docs/results_json.md"]


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
