"""Runs of a report that are read from its ``cells.csv``."""

from pathlib import Path

from randlora_pl.lab.report.runs import read_runs

TABLE = """\
model,family,dataset,budget,method,seed,state,accuracy,test/acc/boolq,test/acc/piqa,adapter,trainable,version
qwen2,,commonsense,15k,LoRA,1,finished,61.5,60.5,62.5,LoRA,5960000,0.2
qwen2,,commonsense,15k,LoRA,2,failed,,,,,,
qwen2,,commonsense,15k,LoRA,,missing,,,,,,
"""


def test_empty_cells_are_no_figures(tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text(TABLE)
    finished, failed, missing = read_runs(tmp_path / "cells.csv")
    assert (finished.accuracy, finished.facts["test/acc/piqa"], finished.facts["version"]) == (61.5, 0.625, "0.2")
    assert finished.number("trainable") == 5_960_000 and finished.family == ""
    assert (failed.seed, failed.accuracy, failed.facts, failed.reason) == (2, None, {}, "")
    assert (missing.seed, missing.facts) == (None, {})
