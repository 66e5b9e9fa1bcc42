"""Report of a dataset check."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from randlora_pl.data.catalog.registry import DatasetSpec, default_root, may_be_read
from randlora_pl.data.locations import root_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.option_types import Option
from randlora_pl.utils.text.formatting import printable
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.data.check import Report


Names = Annotated[Sequence[str], Option("NAME", "Datasets (randlora-pl datasets)")]
All = Annotated[bool, Option(help="All datasets")]


def check_names(command: str, names: Sequence[str], everything: bool) -> None:
    """Refuse a command that takes datasets, or ``--all`` of them, and got neither or both."""
    if everything == bool(names):
        both = "names datasets and --all" if everything else "no dataset is named"
        raise UserError(f"{command}: {both}. Use: randlora-pl {command} NAME ..., or --all")


SAMPLE = 8
"""Images per split that a check decodes."""


_HEADER = ("dataset", "split", "images", "expected", "fewest of a class", "most of a class", "decoded", "")


def print_reports(reports: Sequence["Report"], every: bool = False) -> int:
    """Print a table of the reports, and their problems; return 1 if something is wrong or missing, else 0.

    Args:
        reports: Results of the checks.
        every: True if all images were to be decoded.
    """
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
        print(table(_HEADER, rows))
        print()
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


def checked_root(given: str | None, rows: Sequence[DatasetSpec], verb: str, option: str = "--root") -> Path:
    """Return the folder of the datasets; it must exist, and be given for the user's own data.

    Args:
        given: Typed value of the option.
        rows: The datasets.
        verb: The command up to the name of a dataset, for messages.
        option: The option for the folder.
    """
    if given is None:
        if own := [row for row in rows if row.own]:
            where = f"randlora-pl {verb} {own[0].name} {own[0].source.replace('--data.root', option)}"
            raise UserError(f"The dataset {own[0].name!r} needs {option} ({own[0].layout}): {where}")
        return default_root()
    root = root_of(given)
    if not root.exists() and not any(may_be_read(row, root) for row in rows):
        holds = "expected" if rows[0].own else "it is the folder that holds"
        raise UserError(f"{option} {root} does not exist; {holds} {rows[0].layout or 'the data'}")
    return root
