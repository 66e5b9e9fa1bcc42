"""``zeroshot``: accuracy of a pretrained CLIP on test images, beside the published one."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.commands.common.arguments import CommandParser
from randlora_pl.commands.common.devices import advised, pick_device
from randlora_pl.commands.common.progress import counting
from randlora_pl.commands.data.report import checked_root
from randlora_pl.data.catalog.registry import PAPER, DatasetSpec, default_root, find, how_to_get, present
from randlora_pl.data.locations import root_of
from randlora_pl.data.own_format import format_of
from randlora_pl.run.run_folder import new_folder
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.text.console import silence_library_warnings
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.lab.zeroshot import ZeroShot
    from randlora_pl.models import LoadedClip

ALL = "all"


def zeroshot_verb(args: list[str]) -> int:
    """Test the model on each dataset, print one table, and write ``zeroshot.json`` to a run folder.

    Returns:
        0, or 1 if a dataset of ``all`` could not be tested.
    """
    typed = _parse(args)
    rows, absent, root = _chosen(typed)
    if typed.name is None:
        some = "--model.name ViT-B-32 --model.pretrained openai, or --model.name tiny, a toy for images of 32 pixels"
        raise UserError("zeroshot needs a base model.", f"Add {some}. All models: randlora-pl models")
    from randlora_pl.utils.text.console import log_to_terminal

    silence_library_warnings()
    log_to_terminal()
    device = pick_device(typed.device)
    clip = _load(typed)
    clip.model.to(device)
    found: dict[str, ZeroShot] = {}
    failed: dict[str, str] = {}
    folder: Path | None = None
    for row in rows:
        try:
            found[row.name] = _test(clip, row, root, typed.batch, device)
        except UserError as error:
            if typed.dataset != ALL:
                raise
            failed[row.name] = str(error)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"the finished results are in {folder}" if folder else "") from stop
        folder = folder or new_folder(typed.root_of_runs, "zeroshot")
        _write(folder, clip, found, failed, absent)
    _print(clip, found, failed, [find(name) for name in absent], root)
    print(f"\nResults: {folder}/zeroshot.json")
    return 1 if failed else 0


def _parse(args: list[str]) -> argparse.Namespace:
    parser = CommandParser("zeroshot")
    parser.add_argument("--model.name", dest="name")
    parser.add_argument("--model.pretrained", dest="pretrained")
    parser.add_argument("--data.dataset", dest="dataset")
    parser.add_argument("--data.root", dest="root")
    parser.add_argument("--data.eval_batch_size", dest="batch", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run.root", dest="root_of_runs", type=Path, default=Path("runs"))
    typed = parser.parse_args(args)
    if typed.batch < 1:
        raise UserError(f"--data.eval_batch_size is {typed.batch}: give a positive whole number.")
    if typed.dataset is None:
        typed.dataset = "digits" if typed.root is None else format_of(root_of(typed.root))
    return typed


def _chosen(typed: argparse.Namespace) -> tuple[list[DatasetSpec], list[str], Path]:
    """Return the datasets to test, the names of datasets that are not on this machine, and the data folder."""
    names = PAPER if typed.dataset == ALL else (typed.dataset,)
    rows = [find(name) for name in names]
    if rows[0].captions:
        use = f"randlora-pl test --model.name {typed.name or 'NAME'} --data.dataset {rows[0].name}"
        use += f" --data.root {typed.root or 'FILE'}"
        raise UserError(f"{rows[0].title}: captions are not classes; for recall without training: {use}")
    root = checked_root(typed.root, rows, "zeroshot --data.dataset", "--data.root")
    there = [row for row in rows if present(row, root)]
    if not there:
        if typed.dataset == ALL:
            raise UserError(f"None of the paper's {len(PAPER)} datasets is in {root}; see: randlora-pl doctor")
        raise UserError(how_to_get(rows[0], root))
    return there, [row.name for row in rows if row not in there], root


def _load(typed: argparse.Namespace) -> "LoadedClip":
    """Return the model with its tokenizer."""
    from open_clip import list_pretrained_tags_by_model

    from randlora_pl.models import load_clip
    from randlora_pl.models.clip_source import resolve

    source = resolve(typed.name, typed.pretrained)
    if source.kind == "random" and typed.pretrained is None:
        tags = list_pretrained_tags_by_model(source.name)
        some = f"{', '.join(tags[:4])}{' ...' if len(tags) > 4 else ''}" if tags else "a file"
        raise UserError(f"zeroshot: {source.name} needs trained weights: --model.pretrained with {some}, or random")
    clip = load_clip(typed.name, typed.pretrained)
    _ = clip.tokenizer  # its files may be missing: raise the error now, not after the first images
    return clip


def _test(clip: "LoadedClip", row: DatasetSpec, root: Path, batch: int, device: Any) -> "ZeroShot":
    """Test the model on one dataset."""
    from randlora_pl.lab.zeroshot import evaluate, prepare

    hint = f"Find the cause: randlora-pl data check {row.name} --root {root} --every-image"
    with advised(f"--data.eval_batch_size {max(1, batch // 2)}", hint):
        data = prepare(clip, row.name, root, batch)
        with counting(True, f"{row.name}: {{task.completed:,}} of {len(data.samples('test')):,} images") as tick:
            return evaluate(clip, data, device, tick)


def _write(
    folder: Path, clip: "LoadedClip", found: dict[str, "ZeroShot"], failed: dict[str, str], absent: Sequence[str]
) -> None:
    """Write all results so far, after each dataset, so that an interrupted command keeps finished ones."""
    from randlora_pl.lab.zeroshot import SINGLE, SOURCE

    content = {
        "model": clip.identity.as_dict(),
        "single_prompt": SINGLE,
        "published_source": SOURCE,
        "unit": "percent of the test images",
        "datasets": {name: one.as_dict() for name, one in found.items()},
        "failed": failed,
        "missing": list(absent),
    }
    write_text(folder / "zeroshot.json", json.dumps(content, indent=1) + "\n")


def _print(
    clip: "LoadedClip", found: dict[str, "ZeroShot"], failed: dict[str, str], absent: Sequence[DatasetSpec], root: Path
) -> None:
    """Print the table, and below it the datasets that it lacks."""
    from randlora_pl.lab.zeroshot import OTHER_SPLIT, SINGLE, SOURCE

    known = any(one.published is not None for one in found.values())
    header = ["dataset", "images", "classes", "templates", "averaged %", f"{SINGLE!r} %"]
    rows = []
    for name, one in found.items():
        images = f"{one.images:,}" if one.expected in (None, one.images) else f"{one.images:,} of {one.expected:,}"
        cells = [name, images, one.classes, one.templates, f"{one.ensemble:.2f}", f"{one.single:.2f}"]
        if known:
            cells += ["", ""] if one.published is None else [f"{one.published:.2f}", f"{one.difference:+.2f}"]
        rows.append(cells)
    identity = clip.identity
    print(f"{identity.name} ({identity.pretrained}), pretrained, on the test images:\n")
    if rows:
        print(table([*header, "published %", "difference"] if known else header, rows))
    if known:
        print(f"\nPublished: {SOURCE}.")
        other = [name for name in OTHER_SPLIT if name in found]
        if other:
            print(f"Published for other test images, drawn at random: {', '.join(other)}.")
    for name, message in failed.items():
        print(f"\n{name} could not be tested: {message}")
    if absent:
        print(f"\nMissing in {root}: {', '.join(row.name for row in absent)}")
        below = "" if root == default_root() else f" --root {root}"
        print(f"How to get them: randlora-pl data check --all --fast{below}")
