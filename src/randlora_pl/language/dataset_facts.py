"""Availability of the texts of a dataset on this machine, by the names of their files alone."""

from collections.abc import Sequence
from pathlib import Path

from randlora_pl.data.catalog import DatasetSpec
from randlora_pl.data.catalog.registry import CATALOG, dataset_path, default_root, find, get_command, present
from randlora_pl.language import glue, prompt_sets
from randlora_pl.language.catalog import DATASETS, LABELLED, OWN_TEXTS, TASKS
from randlora_pl.language.text_files import first_file
from randlora_pl.utils.errors import UserError, near


def absent(dataset: str, root: Path, tests: Sequence[str] | None = None, trains: bool = True) -> UserError | None:
    """Return the missing part of a dataset and its source; None if all of it is there.

    Args:
        dataset: Name of the dataset.
        root: The folder of the data.
        tests: Selected commonsense tests, None for all.
        trains: True if training samples are needed.
    """
    try:
        if dataset in glue.TASKS:
            lacking = [glue.missing(root, dataset, "train")] * trains + [glue.missing(root, dataset, "validation")]
            return next((UserError(f"{each} does not exist", glue.GET) for each in lacking if each), None)
        if dataset in OWN_TEXTS:
            name = f"train.{dataset}"
            how = "your own texts, see docs/prompts.md and docs/labelled_texts.md; of a bundled sweep, by the commands "
            how += "in the first lines of its config (randlora-pl config cat sweeps/NAME)"
            if not root.is_file():
                first_file(root, (name,), name, how)
        elif dataset == "e2e":
            for name in ("train.txt", "valid.txt", "test.txt"):
                first_file(root, (name,), prompt_sets.E2E_TREE, prompt_sets.E2E_SOURCE)
        else:
            wanted = [f"ft-training_set/{dataset}.json"] * trains
            for name in [*wanted, *(f"dataset/{test}/test.json" for test in tests or prompt_sets.TASKS)]:
                first_file(root, (name.partition("/")[2], name), prompt_sets.TREE, prompt_sets.SOURCE)
    except UserError as error:
        return error
    return None


TEXT_PAGES = ("docs/prompts.md", "docs/labelled_texts.md")


def find_images(name: str) -> DatasetSpec:
    """Return the specification of a dataset of images.

    Raises:
        UserError: The dataset is unknown, or one of texts; the message has the command that reads those.
    """
    tasks = [task for known, task in zip((DATASETS, LABELLED), TASKS, strict=True) if name in known]
    if name not in CATALOG and tasks:
        check = f"randlora-pl fit --model {tasks[0]} --data.dataset {name} --data.root PATH --dry-run"
        other = f" (or --model {tasks[1]})" if tasks[1:] else ""
        raise UserError(f"{name} is a dataset of texts, not of images. To check its files{other}: {check}")
    return find(name)


def dataset_facts(name: str, root: Path) -> list[dict[str, str]]:
    """Return the full description of a dataset; one of texts has one for each task that takes it."""
    if name in CATALOG:
        row = CATALOG[name]
        classes = f"{row.classes}, named by its files" if row.classes else "as in your files"
        return [
            {
                "what it is": row.title,
                "classes": _some(row.classnames, 260) or classes,
                "images": ", ".join(f"{split} {count:,}" for split, count in row.counts.items()) or "as in your files",
                "epochs": str(row.epochs),
                "its prompts": _some(row.templates, 20, " | "),
                "files": row.layout and (row.layout if row.own else f"{row.layout} below {root} or --data.root"),
                "state": "" if row.own else state_of(row, root),
                "get it": "" if row.own or not row.layout else f"randlora-pl data get {row.name}",
                "source": row.source,
                "licence": row.licence,
                "note": row.note,
            }
        ]
    found = []
    for known, task, page in zip((DATASETS, LABELLED), TASKS, TEXT_PAGES, strict=True):
        source = {"files": f"below --data.root PATH, see {page}"}
        if name in glue.TASKS:
            source = {"get it": glue.SOURCE}
        elif name not in OWN_TEXTS:
            tree, get = prompt_sets.TREE, prompt_sets.SOURCE
            if name == "e2e":
                tree, get = prompt_sets.E2E_TREE, prompt_sets.E2E_SOURCE
            source = {"files": f"{tree}; below --data.root PATH", "get it": get}
        if name in known:
            found.append({"what it is": known[name], "use": f"--model {task} --data.dataset {name}"} | source)
    if not found:
        hint = near(name, [*CATALOG, *DATASETS, *LABELLED])
        raise UserError(f"Unknown dataset {name!r}.{hint} See: randlora-pl datasets")
    return found


def state_of(row: DatasetSpec, root: Path) -> str:
    """Return the state of a dataset below the folder of datasets, and how to get it."""
    if row.own:
        return "yours"
    if row.package and not present(row, root):
        return f"not here: pip install {row.package}"
    if not row.layout:
        return "built in"
    return "here" if present(row, root) else f"not here: {'data get' if row.download else 'by hand'}"


def _some(words: Sequence[str], most: int, between: str = ", ") -> str:
    return between.join(words if len(words) <= most else [*words[:10], f"... ({len(words)})"])


def datasets() -> dict[str, str]:
    """Return the datasets on this machine, and the commands to get the others."""
    root = default_root()
    found = {}
    for row in CATALOG.values():
        if row.own:
            continue
        state, steps = state_of(row, root), "" if row.package or row.download else " (prints the steps)"
        known = {"built in": "built in", "here": f"found: {dataset_path(row, root)}"}
        found[row.name] = known.get(state, f"missing: {get_command(row, root)}{steps}")
    for name in DATASETS | LABELLED:
        if name not in OWN_TEXTS:
            steps = f"missing: randlora-pl datasets {name} (prints the steps)"
            found[name] = steps if absent(name, root) else f"found below {root}"
    return found | {"your own": "--data.dataset folder --data.root PATH; of texts csv or jsonl"}
