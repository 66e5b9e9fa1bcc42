"""Facts of a finished training for ``results.json``."""

from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

from randlora_pl.run.callbacks import AdapterCheckpoint, Patience, PeakMemory, Throughput
from randlora_pl.run.lightning_cli import App
from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.utils.files.run_files import ADAPTER, LAST
from randlora_pl.utils.run_results import data_results, environment, model_results

Kind = TypeVar("Kind", bound=Callback)


def fit_metrics(app: App) -> dict[str, Any]:
    """Return counts, times, memory and versions of a finished training."""
    trainer, data = app.trainer, app.datamodule
    throughput = callback_of(trainer, Throughput)
    speed = throughput.per_second
    kept = callback_of(trainer, AdapterCheckpoint)
    sizes = {"checkpoint_bytes": app.folder / LAST, "adapter_bytes": app.folder / ADAPTER / "adapter.safetensors"}
    return {
        **kept.validated,
        **({f"best/{kept.monitor}": kept.best, "best/step": kept.best_step} if kept.best is not None else {}),
        **_ended_early(app),
        **{name: file.stat().st_size for name, file in sizes.items() if file.is_file()},
        **model_results(app.model),
        **data_results(data),
        "steps": trainer.global_step,
        "effective_batch": data.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        "batch_size": data.batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        **(trainer.strategy.metrics() if isinstance(trainer.strategy, AdapterDDP) else {}),
        "device": str(app.model.device.type),
        "precision": str(trainer.precision),
        "fit_seconds": round(throughput.seconds, 3),
        f"{data.unit}_per_second": round(speed * trainer.world_size, 2) if speed else None,
        "peak_memory_bytes": callback_of(trainer, PeakMemory).peak,
        **environment(),
    }


def _ended_early(app: App) -> dict[str, Any]:
    """Return why patience ended the training before its last step; empty for a run without patience."""
    patience = next((callback for callback in callbacks_of(app.trainer) if isinstance(callback, Patience)), None)
    if patience is None:
        return {}
    early = patience.exhausted and app.trainer.global_step < app.model.total_steps()
    return {"stopped_early": patience.reason if early else None}


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's own list of callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def callback_of(trainer: Trainer, kind: type[Kind]) -> Kind:
    """Return the trainer's callback of a class."""
    return next(callback for callback in callbacks_of(trainer) if isinstance(callback, kind))
