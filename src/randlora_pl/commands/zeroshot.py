"""``zeroshot``: accuracy of a pretrained CLIP on test images, beside the published one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from randlora_pl import models
from randlora_pl.commands.common import advised, counting, pick_device
from randlora_pl.commands.data import checked_root, present_root
from randlora_pl.data.catalog import PAPER, DatasetSpec, default_root, find, present
from randlora_pl.data.locations import root_of
from randlora_pl.data.validate import format_of
from randlora_pl.run.run_folder import new_folder
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Count, Device, Option
from randlora_pl.utils.text import table

if TYPE_CHECKING:
    from randlora_pl.lab.zeroshot import ZeroShot


def zeroshot(
    *,
    name: Annotated[str | None, Option("NAME", names=("--model.name",))] = None,
    pretrained: Annotated[str | None, Option("TAG", names=("--model.pretrained",))] = None,
    dataset: Annotated[str | None, Option("NAME", names=("--data.dataset",))] = None,
    root: Annotated[str | None, Option("PATH", names=("--data.root",))] = None,
    batch: Annotated[Count, Option(names=("--data.eval_batch_size",))] = 256,
    device: Device = "auto",
    root_of_runs: Annotated[Path, Option("FOLDER", names=("--run.root",))] = Path("runs"),
) -> int:
    """Test a pretrained CLIP with averaged and single prompts, and print the published accuracies.

    A difference of more than a few tenths of a point suggests a wrong layout, class order or prompt.

    Examples:
        randlora-pl zeroshot --model.name tiny                      the tiny CLIP on the digits
        randlora-pl zeroshot --model.name ViT-B-32 --model.pretrained openai --data.dataset all

    Args:
        name: An open_clip architecture, or tiny, which is bundled
        pretrained: A tag of open_clip, a weights file, or random
        dataset: A dataset, or all: the paper's datasets that are on this machine (default: the format of --data.root,
            else digits)
        root: Folder with the data (default: the user's data folder)
        batch: Images per batch
        root_of_runs: zeroshot.json is written to FOLDER/zeroshot/TIME

    Returns:
        0, or 1 if a dataset of all could not be tested.
    """
    dataset = dataset or ("digits" if root is None else format_of(root_of(root)))
    rows, absent, folder_of_data = _chosen(name, dataset, root)
    if name is None:
        some = "--model.name ViT-B-32 --model.pretrained openai, or --model.name tiny, a toy for images of 32 pixels"
        raise UserError("zeroshot needs a base model.", f"Add {some}. All models: randlora-pl models")
    from open_clip import list_pretrained_tags_by_model

    from randlora_pl.lab import zeroshot as lab
    from randlora_pl.models.clip import resolve

    place = pick_device(device)
    source = resolve(name, pretrained)
    if source.kind == "random" and pretrained is None:
        tags = list_pretrained_tags_by_model(source.name)
        some = f"{', '.join(tags[:4])}{' ...' if len(tags) > 4 else ''}" if tags else "a file"
        raise UserError(f"zeroshot: {source.name} needs trained weights: --model.pretrained with {some}, or random")
    clip = models.load_clip(name, pretrained)
    _ = clip.tokenizer  # its files may be missing: raise the error now, not after the first images
    clip.model.to(place)
    results: dict[str, lab.ZeroShot] = {}
    failed: dict[str, str] = {}
    folder: Path | None = None
    for row in rows:
        try:
            hint = f"Find the cause: randlora-pl data check {row.name} --root {folder_of_data} --every-image"
            with advised(f"--data.eval_batch_size {max(1, batch // 2)}", hint):
                data = lab.prepare(clip, row.name, folder_of_data, batch)
                with counting("images", len(data.samples("test")), row.name) as tick:
                    results[row.name] = lab.evaluate(clip, data, place, tick)
        except UserError as error:
            if dataset != "all":
                raise
            failed[row.name] = str(error)
        except KeyboardInterrupt as stop:
            raise type(stop)(f"the finished results are in {folder}" if folder else "") from stop
        folder = folder or new_folder(root_of_runs, "zeroshot")
        content = {
            "model": clip.identity.as_dict(),
            "single_prompt": lab.SINGLE,
            "published_source": lab.SOURCE,
            "unit": "percent of the test images",
            "datasets": {name: one.as_dict() for name, one in results.items()},
            "failed": failed,
            "missing": absent,
        }  # after each dataset, so that an interrupted command keeps finished ones
        write_text(folder / "zeroshot.json", json.dumps(content, indent=1) + "\n")
    _print(clip, results, failed)
    if absent:
        print(f"\nMissing in {folder_of_data}: {', '.join(absent)}")
        below = "" if folder_of_data == default_root() else f" --root {folder_of_data}"
        print(f"How to get them: randlora-pl data check --all --fast{below}")
    print(f"\nResults: {folder}/zeroshot.json")
    return 1 if failed else 0


def _chosen(model: str | None, dataset: str, place: str | None) -> tuple[list[DatasetSpec], list[str], Path]:
    """Return the datasets to test, the names of datasets that are not on this machine, and the data folder."""
    names = PAPER if dataset == "all" else (dataset,)
    rows = [find(name) for name in names]
    if rows[0].captions:
        use = f"randlora-pl test --model.name {model or 'NAME'} --data.dataset {rows[0].name}"
        use += f" --data.root {place or 'FILE'}"
        raise UserError(f"{rows[0].title}: captions are not classes; for recall without training: {use}")
    where = place, rows, "zeroshot --data.dataset", "--data.root"
    if dataset != "all":
        return rows, [], present_root(*where)
    root = checked_root(*where)
    there = [row for row in rows if present(row, root)]
    if not there:
        raise UserError(f"None of the paper's {len(PAPER)} datasets is in {root}; see: randlora-pl doctor")
    return there, [row.name for row in rows if row not in there], root


def _print(clip: "models.LoadedClip", results: dict[str, "ZeroShot"], failed: dict[str, str]) -> None:
    """Print the table, and below it why datasets could not be tested."""
    from randlora_pl.lab.zeroshot import OTHER_SPLIT, SINGLE, SOURCE

    known = any(one.published is not None for one in results.values())
    header = ["dataset", "images", "classes", "templates", "averaged %", f"{SINGLE!r} %"]
    rows = []
    for name, one in results.items():
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
        other = [name for name in OTHER_SPLIT if name in results]
        if other:
            print(f"Published for other test images, drawn at random: {', '.join(other)}.")
    for name, message in failed.items():
        print(f"\n{name} could not be tested: {message}")
