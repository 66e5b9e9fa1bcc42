"""Small sweeps that the tests of this folder and of the command line share."""

from pathlib import Path
from typing import Any

import yaml

from randlora_pl.sweep import SweepConfig
from randlora_pl.sweep.plan import Cell, plan

GRID: dict[str, Any] = {
    "title": "small",
    "models": {"tiny": {"config": "tiny_clip", "set": {"model.pretrained": "random"}}},
    "datasets": ["digits"],
    "budgets": [2],
    "methods": {"RandLoRA-6": {"adapter": "RandLoRA", "rank": 6}, "LoRA-4": {"adapter": "LoRA", "rank": 4}},
    "seeds": [1],
    "set": {
        **{"data.steps": 2, "data.batch_size": 4, "data.eval_batch_size": 8, "trainer.limit_val_batches": 0},
        **{"trainer.limit_test_batches": 1, "trainer.accelerator": "cpu", "run.logger": "none"},
    },
}
"""Two cells of about a second each."""


def cells_of(**changes: Any) -> list[Cell]:
    return plan(SweepConfig.from_content(GRID | changes))


def written(folder: Path, name: str = "small.yaml", **changes: Any) -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return file
