"""What a search found is written as a config, and the command that the run prints trains it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.support.cli import SMALL, Run

ENDS: dict[str, tuple[list[str], str, str]] = {
    "ranks": (["--model.adapter.rank", "3"], "LoRA", "rank"),
    "bases": (["--model.adapter.select", "bases", "--model.adapter.rank", "48"], "RandLoRA", "num_bases"),
}


@pytest.mark.parametrize("select", ["ranks", pytest.param("bases", marks=pytest.mark.full)])
def test_what_is_found_trains_on_all_samples(select: str, run: Run, tmp_path: Path) -> None:
    typed, method, option = ENDS[select]
    shown = run("fit", *SMALL, "--config", "autolora", *typed, "--run.name", "search")
    assert shown.code == 0, shown.err
    assert "20 train" in shown.out and "6 of train for the search" in shown.out
    (folder,) = tmp_path.glob("runs/search/2*")
    results = json.loads((folder / "results.json").read_text())
    assert (results["data/search"], results["learning_rate"]) == (6, 3e-4)
    fragment = yaml.safe_load((folder / "ranks.yaml").read_text())["model"]["init_args"]
    found = fragment["adapter"]["init_args"][option]
    assert fragment["adapter"] == results["search/adapter"] and fragment["adapter"]["class_path"] == method
    assert results["search/mean"] == pytest.approx(sum(found.values()) / len(found)) and len(found) == 12
    command = re.search(r"randlora-pl (fit --config \S+ --config \S+ranks.yaml)", shown.out.replace("\n", " "))
    assert command is not None, shown.out
    assert command[1] in (folder / "ranks.yaml").read_text()
    after = run(*shlex.split(command[1]), "--run.name", "found")
    assert after.code == 0, after.err
    assert f"{method} rank" in after.out and "by 12 patterns" in after.out
    (second,) = tmp_path.glob("runs/found/2*")
    trained = json.loads((second / "results.json").read_text())
    assert trained["method"] == method and trained["learning_rate"] == 1e-3 and "data/search" not in trained
    assert not (second / "ranks.yaml").exists()
