"""Made-up sweeps of language models: a run has eight tests, and figures under each."""

from pathlib import Path
from typing import Any

from randlora_pl.language.prompt_sets import TASKS
from tests.lab.report.sweeps import sweep_yaml, write_cell

ACCURACY = dict(zip(TASKS, (0.61, 0.68, 0.66, 0.40, 0.57, 0.62, 0.48, 0.60), strict=True))
"""Near RandLoRA-10 with 170k in Table 15."""


def figures(method: str, shift: float = 0.0, trained: int = 5_956_992) -> dict[str, Any]:
    """What a finished commonsense run says."""
    tests = {f"test/acc/{name}": value + shift for name, value in ACCURACY.items()}
    return {
        "finished": True, "test/acc": sum(tests.values()) / 8, **tests, "method": method.partition("-")[0],
        "trainable_parameters": trained, "total_parameters": 494_032_768 + trained, "base/library": "transformers",
        "fit_seconds": 100.0, "samples_per_second": 40.0, "peak_memory_bytes": 5 * 10**9, "device": "cuda",
    }  # fmt: skip


def write_language_sweep(folder: Path, cells: dict[tuple[str, str, int], dict[str, Any] | str], **changes: Any) -> Path:
    """A sweep of Qwen2 with these cells."""
    methods = {"zero-shot": {}, "LoRA-16": {"adapter": "LoRA"}, "RandLoRA-10": {"adapter": "RandLoRA"}}
    content = {
        "paper": {"table": 15}, "models": {"Qwen2": {"config": "commonsense_qwen2"}}, "datasets": ["commonsense"],
        "budgets": ["15k", "170k"], "methods": methods, "seeds": [1, 2],
    } | changes  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(sweep_yaml(content))
    (model,), (dataset,) = content["models"], content["datasets"]
    for (budget, method, seed), found in cells.items():
        labels = {"model": model, "dataset": dataset, "budget": budget, "method": method, "seed": seed}
        write_cell(folder, labels, *((None, found) if isinstance(found, str) else (found,)))
    return folder
