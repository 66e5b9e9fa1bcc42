"""Download, verify and preview datasets."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from randlora_pl.commands.common import check_file, counting
from randlora_pl.data import catalog
from randlora_pl.data.catalog import CATALOG, DatasetSpec, dataset_path, default_root, find, get_command, present
from randlora_pl.data.download import ProgressCallback
from randlora_pl.data.locations import root_of
from randlora_pl.language import glue, prompt_sets
from randlora_pl.language.catalog import DATASETS, LABELLED, OWN_TEXTS, TASKS
from randlora_pl.language.chat import MESSAGES
from randlora_pl.language.text_files import first_file
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.options import File, Option, Root, between
from randlora_pl.utils.text import printable, table

if TYPE_CHECKING:
    from randlora_pl.data.install import Report


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
            name = f"train.{OWN_TEXTS[dataset]}"
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
                "files": row.layout and (row.layout if row.own else f"{row.layout} under {root} or --data.root"),
                "state": "" if row.own else state_of(row, root),
                "get it": "" if row.own or not row.layout else f"randlora-pl data get {row.name}",
                "source": row.source,
                "license": row.license,
                "note": row.note,
            }
        ]
    facts = []
    for known, task, page in zip((DATASETS, LABELLED), TASKS, TEXT_PAGES, strict=True):
        source = {"files": f"under --data.root PATH, see {page}"}
        if name == "chat":
            files = "train.jsonl, and if you like val.jsonl and test.jsonl, under --data.root PATH"
            source = {"files": files, "each line": MESSAGES, "guide": page}
        elif name in glue.TASKS:
            source = {"get it": glue.SOURCE}
        elif name not in OWN_TEXTS:
            tree, get = prompt_sets.TREE, prompt_sets.SOURCE
            if name == "e2e":
                tree, get = prompt_sets.E2E_TREE, prompt_sets.E2E_SOURCE
            source = {"files": f"{tree}; under --data.root PATH", "get it": get}
        if name in known:
            facts.append({"what it is": known[name], "use": f"--model {task} --data.dataset {name}"} | source)
    if not facts:
        hint = near(name, [*CATALOG, *DATASETS, *LABELLED])
        raise UserError(f"Unknown dataset {name!r}.{hint} See: randlora-pl datasets")
    return facts


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
    states = {}
    for row in CATALOG.values():
        if row.own:
            continue
        state, steps = state_of(row, root), "" if row.package or row.download else " (prints the steps)"
        known = {"built in": "built in", "here": f"found: {dataset_path(row, root)}"}
        states[row.name] = known.get(state, f"missing: {get_command(row, root)}{steps}")
    for name in DATASETS | LABELLED:
        if name not in OWN_TEXTS:
            steps = f"missing: randlora-pl datasets {name} (prints the steps)"
            states[name] = steps if absent(name, root) else f"found under {root}"
    return states | {"your own": "--data.dataset folder --data.root PATH; of texts csv, jsonl or chat"}


Names = Annotated[Sequence[str], Option("NAME", "Datasets (randlora-pl datasets)")]
All = Annotated[bool, Option(help="All datasets")]


def check_names(command: str, names: Sequence[str], everything: bool) -> None:
    """Refuse a command that takes datasets, or ``--all`` of them, and got neither or both."""
    if everything == bool(names):
        both = "names datasets and --all" if everything else "no dataset is named"
        raise UserError(f"{command}: {both}. Use: randlora-pl {command} NAME ..., or --all")


_SAMPLE = 8
"""Images per split that a check decodes."""


def _print_reports(reports: Sequence["Report"], every: bool = False) -> int:
    """Print a table of the reports, and their problems; return 1 if something is wrong or missing, else 0."""
    rows = []
    for report in reports:
        for number, part in enumerate(report.splits):
            wrong = part.expected is not None and part.images != part.expected
            rows.append((
                "" if number else report.name, part.split, f"{part.images:,}",
                None if part.expected is None else f"{part.expected:,}",
                _per_class(part.fewest), _per_class(part.most), f"{part.decoded:,}", "OFF" if wrong else "",
            ))  # fmt: skip
    if rows:
        header = ("dataset", "split", "images", "expected", "fewest of a class", "most of a class", "decoded", "")
        print(f"{table(header, rows)}\n")
    missing = [report for report in reports if report.missing]
    off = [report for report in reports if report.problems and not report.missing]
    for report in off:
        print(f"{report.name} is off:")
        for problem in report.problems:
            print("  " + printable(str(problem)).replace("\n", "\n  "))
        print()
    for report in missing:
        print(*(printable(str(problem)) for problem in report.problems))
    for report in reports:
        decoded, clear = (sum(getattr(part, key) for part in report.splits) for key in ("decoded", "transparent"))
        if clear:
            print(f"{report.name}: {clear:,} of {decoded:,} decoded images are transparent. They are laid on white.")
    images, decoded = (sum(getattr(p, key) for r in reports for p in r.splits) for key in ("images", "decoded"))
    if decoded < images and not every:
        print(f"{decoded:,} of {images:,} images were decoded (--every-image decodes all)")
    sets = "1 dataset" if len(reports) == 1 else f"{len(reports)} datasets"
    print(f"{sets}: {len(reports) - len(missing) - len(off)} as expected, {len(off)} off, {len(missing)} missing")
    return 1 if off or missing else 0


def _per_class(count: tuple[str, int] | None) -> str:
    if count is None:
        return ""
    name, images = count
    short = name if len(name) <= 26 else f"{name[:12]}...{name[-11:]}"  # long names differ at their ends
    return f"{images:,} ({short})"


def checked_root(given: str | None, rows: Sequence[DatasetSpec], verb: str) -> Path:
    """Return the folder of the datasets; it must exist, and be given for the user's own data.

    Args:
        given: Typed value of ``--root``.
        rows: The datasets.
        verb: The command up to the name of a dataset.
    """
    if given is None:
        if own := [row for row in rows if row.own]:
            where = f"randlora-pl {verb} {own[0].name} {own[0].source.replace('--data.root', '--root')}"
            raise UserError(f"The dataset {own[0].name!r} needs --root ({own[0].layout}): {where}")
        return catalog.default_root()
    root = root_of(given)
    if not root.exists() and not any(catalog.may_be_read(row, root) for row in rows):
        holds = "expected" if rows[0].own else "it is the folder that holds"
        raise UserError(f"--root {root} does not exist; {holds} {rows[0].layout or 'the data'}")
    return root


def present_root(given: str | None, rows: Sequence[DatasetSpec], verb: str) -> Path:
    """Return the folder of the datasets, see `checked_root`; all of them must be there."""
    root = checked_root(given, rows, verb)
    for row in rows:
        if not present(row, root):
            raise UserError(catalog.how_to_get(row, root))
    return root


def check(
    names: Names = (),
    *,
    all: All = False,
    root: Root = None,
    fast: bool = False,
    every_image: bool = False,
    split: Literal["default", "coop"] = "default",
) -> int:
    """Compare the images of datasets per split and class with the expected numbers.

    Examples:
        randlora-pl data check digits
        randlora-pl data check --all --fast

    Args:
        fast: Decode no images
        every_image: Decode all images (default: 8 per split)
        split: Check the splits of CoOp instead of the usual ones

    Returns:
        0 if everything is as expected, 1 if something is off or missing.
    """
    check_names("data check", names, all)
    if fast and every_image:
        raise UserError("data check: --fast and --every-image cannot be combined. Remove one")
    known = [row for row in CATALOG.values() if not row.own and (split == "default" or row.coop is not None)]
    chosen = [catalog.with_split(row, split) for row in [find_images(name) for name in names] or known]
    folder = checked_root(root, chosen, "data check")
    from randlora_pl.data import install

    sample = None if every_image else 0 if fast else _SAMPLE
    with counting("images decoded") if every_image else nullcontext(lambda _: None) as tick:
        reports = [install.check(row, folder, sample, tick) for row in {row.name: row for row in chosen}.values()]
    return _print_reports(reports, every_image)


def get(names: Names = (), *, all: All = False, root: Root = None, keep: bool = False) -> int:
    """Download, verify and unpack datasets, or print the manual steps.

    An interrupted download resumes.

    Examples:
        randlora-pl data get cifar10
        randlora-pl data get --all

    Args:
        keep: Keep the archives in PATH/downloads (default: delete them after the check)

    Returns:
        0 if all requested datasets are there and as expected, else 1. With --all, datasets that need manual
        steps do not count.
    """
    check_names("data get", names, all)
    rows = [find_images(name) for name in dict.fromkeys(names)] or [row for row in CATALOG.values() if row.layout]
    if names and (own := [row.name for row in rows if row.own]):
        raise UserError(
            f"data get: {own[0]} is for your own images, so there is nothing to download. See: randlora-pl datasets"
        )
    folder = catalog.default_root() if root is None else Path(root).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--root {folder} is a file; give the folder for the datasets")
    try:
        return _fetch_all([row for row in rows if not row.own], folder, keep, all)
    except KeyboardInterrupt as stop:
        again = "--all" if all else " ".join(names)
        where = "" if root is None else f" --root {shlex.quote(root)}"
        raise type(stop)(
            f"download interrupted, partial files are kept. Resume: randlora-pl data get {again}{where}"
        ) from None


def _fetch_all(rows: Sequence[DatasetSpec], root: Path, keep: bool, everything: bool) -> int:
    """Fetch one dataset after the other, even if one fails; return the exit code."""
    from randlora_pl.data import install

    reports, got, failed, helpless = [], [], [], []
    for row in rows:
        if not row.layout:
            builtin = f"{row.name}: built in, nothing to download"
            print(builtin if catalog.present(row, root) else catalog.how_to_get(row, root))
            continue
        there = install.check(row, root, 0) if catalog.present(row, root) else None
        if there and there.problems:
            print(f"{row.name}: in {root}, but off: {there.problems[0].what}")
        if there and not there.problems:
            print(f"{row.name}: already complete in {root}")
            _tidy(row, root, keep)
        elif install.by_hand(row, root):
            helpless.append(row)
        else:
            try:
                _fetch(row, root)
                report = install.check(row, root, _SAMPLE)
            except UserError as error:
                failed.append(row)
                print(f"randlora-pl: error: {error}", file=sys.stderr)
                continue
            reports.append(report)
            if report.problems:
                failed.append(row)
            else:
                got.append(row)
                _tidy(row, root, keep)
    if reports:
        print()
        _print_reports(reports)
    for row in helpless:
        print(f"\n{row.name} cannot be downloaded by a command; license: {row.license}")
        if row.files:
            with suppress(OSError):
                install.downloads(row, root).mkdir(parents=True, exist_ok=True)
        for line in [*install.by_hand(row, root), f"then: {catalog.get_command(row, root)}"]:
            print(f"  {line}")
    if failed:
        print(f"\nFailed: {', '.join(row.name for row in failed)}. Run the same command again to retry")
    if got:
        where = "" if root == catalog.default_root() else f" --data.root {shlex.quote(str(root))}"
        print(f"\nNext: randlora-pl fit --config clip_vitb32 --data.dataset {got[0].name}{where}")
    return 1 if failed or (helpless and not everything) else 0


def _fetch(row: DatasetSpec, root: Path) -> None:
    """Fetch one dataset, and print each finished step, on a terminal also a bar for the present one."""
    from randlora_pl.data import install

    class Bars(install.DownloadProgress):
        @contextmanager
        def progress(self, text: str) -> Iterator[ProgressCallback]:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("  {task.description}"), BarColumn(20), DownloadColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task(text, total=None)
                yield lambda done, total: progress.update(task, completed=done, total=total)

    home = install.downloads(row, root)
    print(f"{row.name}: {row.title}; license: {row.license}")
    absent = [file for file in row.files if not (home / file.name).exists()]
    count = "1 file" if len(row.files) == 1 else f"{len(row.files)} files"
    print(f"  {count}, {len(absent)} to download: to {home}, unpacked into {root}", flush=True)
    install.get(row, root, Bars() if sys.stderr.isatty() else install.DownloadProgress())


def _tidy(row: DatasetSpec, root: Path, keep: bool) -> None:
    """Remove what was downloaded, now that it is unpacked."""
    from randlora_pl.data import install

    if not keep:
        install.tidy(row, root)
    folder = install.downloads(row, root)
    if left := [file.name for file in row.files if (folder / file.name).exists()]:
        print(f"  no longer needed: {', '.join(left)} in {folder}")


def show(name: str, *, root: Root = None, output: File | None = None, shots: Annotated[int, between(1, 50)] = 4) -> int:
    """Draw a contact sheet (PNG) of a dataset, with class names, split counts and prompts.

    Examples:
        randlora-pl data show digits

    Args:
        name: Dataset (randlora-pl datasets)
        output: New PNG file (default: contact-sheet-NAME.png, which is replaced)
        shots: Training images per class, as --data.shots N selects them with seed 0
    """
    row = find_images(name)
    file = output or Path(f"contact-sheet-{row.name}.png")
    if output is not None:
        if output.suffix.lower() != ".png":
            raise UserError(f"--output is {output}: a contact sheet is a PNG file, for example {row.name}.png")
        check_file(output)
    folder = present_root(root, [row], "data show")
    from randlora_pl.data.unlabelled import Sheet
    from randlora_pl.tasks.images import UsedPrompts
    from randlora_pl.tasks.vision_language import CAPTION

    sheet = Sheet.read(row, folder, shots)
    sheet.write(file)
    print(f"{row.name}: {row.title}")
    print(sheet.caption)
    if not row.captions:
        print(f"Prompts of VisionLanguageTask, the default: {UsedPrompts([CAPTION], [CAPTION]).summary()}")
    also = "" if row.captions else " of TextHeadTask and --model.eval_prompts ensemble"
    print(f"Prompts{also} ({len(sheet.prompts)}), here for the class {sheet.names[0]!r}:")
    for prompt in sheet.prompts:
        print(f"  {printable(prompt)}")
    print(f"\nContact sheet: {file}")
    return 0
