"""``analyze kernel``: the first steps of methods compared with full fine-tuning's, on the models and data of runs."""

import math
import os
import statistics
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from randlora_pl.commands import analyze
from randlora_pl.commands.common import advised, counting, pick_device
from randlora_pl.run.options.saved_config import check_run, check_run_config
from randlora_pl.run.session import prepare, start
from randlora_pl.utils.errors import DryRunEnd, UserError, errors_in
from randlora_pl.utils.options import Count, Device, Runs, at_least
from randlora_pl.utils.text import table

if TYPE_CHECKING:
    import torch


def kernel(
    runs: Runs,
    *,
    samples: Annotated[int, at_least(2)] = 32,
    batches: Count = 4,
    device: Device = "auto",
    output: analyze.NewFolder = None,
) -> int:
    """Compare the first steps of methods with full fine-tuning's: alignment of tangent kernels at the start.

    1 means that the first steps of gradient descent lower the losses of all samples as full fine-tuning of the same
    layers does. It says nothing about later steps or about accuracy.

    Examples:
        randlora-pl analyze kernel runs/lora runs/randlora
        randlora-pl analyze kernel runs/texts --samples 8 --device cuda

    Args:
        runs: Run folders. Each model is built from config and seed, and the trained adapter is not used
        samples: Training samples per batch, whose gradients are compared with each other
        batches: Batches, over which mean and standard deviation are taken

    Note:
        The kernel of two samples is the product of their losses' gradients over what the method trains in the layers,
        without heads. Scales such as alpha and the learning rate do not change the alignment. AdamW's division by the
        size of gradients is not in it. kernel.csv and kernel.json have a row per run, with the alignment of each batch.
    """
    opened = [analyze.open_run(path) for path in runs]
    configs = [check_run_config(check_run(path)) for path in runs]
    where = pick_device(device)
    from randlora_pl.lab.analysis.kernel import kernel_figure

    rows: list[dict[str, Any]] = []
    with counting("runs", len(runs)) as tick, advised("fewer --samples"):
        for run, method, config in zip(opened, analyze.labels_of(opened), configs, strict=True):
            trained, values = _align(config, samples, batches, where)
            spread = statistics.stdev(values) if batches > 1 else 0.0
            error = statistics.fmean(math.sqrt(max(0.0, 1 - value**2)) for value in values)
            row = {"run": str(run.path), "method": method, "parameters": trained}
            row |= {"alignment": statistics.fmean(values), "spread": spread, "error": error}
            rows.append(row | {f"batch_{number}": value for number, value in enumerate(values, 1)})
            tick(1)
    about = f"{batches} batches of {samples} training samples"
    figure = kernel_figure(rows, about)
    folder = analyze.write_output(output, "kernel", rows, {"samples": samples, "rows": rows}, figure)
    print(f"Alignment of the tangent kernel with full fine-tuning's at the start, {about}:\n")
    header = ("method", "trained numbers", "alignment", "error at the best scale")
    forms = ("{method}", "{parameters:,}", "{alignment:.4f} ± {spread:.4f}", "{error:.3f}")
    print(table(header, [[form.format(**row) for form in forms] for row in rows]))
    analyze.print_output(folder)
    return 0


def _align(config: Path, samples: int, batches: int, device: "torch.device") -> tuple[int, list[float]]:
    """Compare the method of a run at its start with full fine-tuning, see `align`.

    The training is set up as ever, with micro-batches of one sample and as many in an optimizer step as in a batch, so
    that an image is compared with the captions of all of them. It ends before its first step.
    """
    from lightning.pytorch.callbacks import LambdaCallback

    from randlora_pl.lab.analysis.kernel import align

    command = prepare("fit", ["--config", str(config)])
    command.config.pop("ckpt_path", None)
    # Options about speed and memory are left out, because full fine-tuning needs plain weights in float32.
    for name in ("frozen_dtype", "quantize", "torch_compile", "gradient_checkpointing", "liger"):
        command.config["model"]["init_args"].pop(name, None)
    command.config["data"] |= {"batch_size": 1, "epochs": None, "steps": batches, "sampling": "epochs"}
    command.config["data"].pop("balance", None)  # the sampler repeats the samples of small classes
    devices = 1 if device.index is None else [device.index]
    where = {"accelerator": device.type, "devices": devices, "enable_progress_bar": False}
    command.config["trainer"] = where | {"accumulate_grad_batches": samples}
    app = start(command, dry=True)
    result: list[tuple[int, list[float]]] = []

    def measure(*_: object) -> None:
        task, data = app.task.to(device).eval(), app.datamodule
        if (count := int(data.state_dict()["num_samples"])) < samples * batches:  # else one is in a batch twice
            raise UserError(
                f"{batches} batches of {samples:,} are more than the {count:,} training samples. Give fewer."
            )
        own = {"micro_batch": 0, "micro_batches": 1}  # each sample encodes the texts itself, with their gradient
        moved = (app.trainer.strategy.batch_to_device(batch) | own for batch in data.train_dataloader())
        sizes = samples, batches, _room(device)
        result.append(align(task.model, lambda batch: task.sample_losses(batch)[0].sum(), moved, *sizes))
        raise DryRunEnd

    app.trainer.callbacks = [LambdaCallback(on_fit_start=measure)]  # type: ignore[attr-defined]
    with suppress(DryRunEnd), errors_in(config.parent):
        app.trainer.fit(app.model, app.datamodule)
    return result[0]


def _room(device: "torch.device") -> int:
    """Return half of the free memory of a device in bytes; the other half is for activations."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0]) // 2
    with suppress(OSError):  # Linux
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024 // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
