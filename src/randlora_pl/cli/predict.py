"""``predict``: classes of images, from an adapter folder alone."""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

from randlora_pl.cli.pages import page
from randlora_pl.cli.parsing import Parser
from randlora_pl.cli.runs import adapter_config
from randlora_pl.errors import UserError


def parse(args: list[str]) -> argparse.Namespace:
    """The options of ``predict``.

    Raises:
        UserError: An unknown, missing or impossible option.
    """
    parser = Parser("predict")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--output", default="predictions.csv")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--top-k", "--top_k", type=int, default=5)
    parser.add_argument("--batch-size", "--batch_size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--on-error", "--on_error", choices=("raise", "skip"), default="raise")
    options = parser.parse_args(args)
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give a positive whole number.")
    return options


def predict_verb(args: list[str]) -> int:
    """Check what was typed, load the adapter, classify, write the CSV file."""
    if not args:
        print(page("predict"), end="")
        return 0
    options = parse(args)
    adapter_config(options.adapter)
    output = None if options.output == "-" else Path(options.output)
    if output is not None and output.exists() and not options.overwrite:
        raise UserError(f"{output} exists; give another --output, or --overwrite to replace it.")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"The folder {output.parent} does not exist; make it first: mkdir -p {output.parent}")
    rows, classes, skipped = classify(options)
    left_out = f"; {skipped:,} unreadable images are left out" if skipped else ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = [name for place in range(2, classes + 1) for name in (f"class_{place}", f"probability_{place}")]
    writer.writerow(["image", "class", "probability", *more])
    writer.writerows(rows)
    if output is None:
        sys.stdout.write(text.getvalue())
        return 0
    from randlora_pl.callbacks.run_folder import write_text

    write_text(output, text.getvalue())
    print(f"{output}: {len(rows):,} images, the best {classes} classes of each{left_out}")
    return 0


def classify(options: argparse.Namespace) -> tuple[list[list[str]], int, int]:
    """One row for each image: file, and its best classes with their probabilities.

    Returns:
        The rows, how many classes each has, and how many images were skipped.

    Raises:
        UserError: The adapter or an image does not load, the device is not there, or memory runs out.
    """
    from randlora_pl.cli.explain import out_of_memory
    from randlora_pl.cli.train import quieten

    quieten()
    import torch

    from randlora_pl.adapters import read_adapter
    from randlora_pl.data import open_images
    from randlora_pl.data.predict import frame_of
    from randlora_pl.tasks import load_task

    device = pick_device(options.device)
    task = load_task(options.adapter)
    frame = frame_of(read_adapter(options.adapter).metadata, task.image_spec)
    loader, files = open_images(options.images, frame, options.batch_size, skip=options.on_error == "skip")
    top = min(options.top_k, len(task.classnames))
    rows: list[list[str]] = []
    try:
        task.to(device)
        task.prepare_evaluation()
        with torch.inference_mode():
            for batch in loader:
                shares = task.class_logits(batch["image"].to(device)).float().softmax(1).topk(top)
                known = batch["readable"]
                order = batch["index"][known].tolist()
                best = shares.indices.cpu()[known].tolist(), shares.values.cpu()[known].tolist()
                for place, labels, values in zip(order, *best, strict=True):
                    named = [
                        (task.classnames[label], f"{value:.6f}") for label, value in zip(labels, values, strict=True)
                    ]
                    rows.append([str(files[place]), *(text for pair in named for text in pair)])
    except UserError as error:  # an unreadable image; the advice for data sets does not fit here
        what = str(error).partition(" Replace it")[0]
        raise UserError(f"{what} Leave it out of --images, or go on without it: --on-error skip") from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory; try --batch-size {max(1, options.batch_size // 2)}") from error
    return rows, top, len(loader.skipped)


def pick_device(name: str) -> Any:
    """A device of this machine; ``auto`` takes the fastest there is.

    Raises:
        UserError: There is no such device.
    """
    import torch

    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise UserError(f"--device {name} is not on this machine; there is {', '.join(there)}.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device: give cpu, cuda, cuda:1 and so on.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} is not on this machine; the last one is {device.type}:{count - 1}.")
    return device
