"""``data check`` and ``data show``: whether a data set is what it should be, and what it looks like."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.cli.common.arguments import Parser
from randlora_pl.cli.common.tables import table
from randlora_pl.cli.help.pages import page
from randlora_pl.data.catalog.registry import CATALOG, Row, default_root, find, how_to_get, may_be_read, present
from randlora_pl.data.locations import root_of
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.text.printable import printable

if TYPE_CHECKING:
    from randlora_pl.data.check import Report

SAMPLE = 8
"""Images of each split that a check decodes."""

SHOTS = 4
"""Images of each class on a contact sheet."""

MOST_SHOTS = 50

_HEADER = ("data set", "split", "images", "expected", "fewest of a class", "most of a class", "decoded", "")


def data_verb(args: list[str]) -> int:
    """``data get ...``, ``data check ...`` or ``data show ...``."""
    if not args:
        print(page("data"), end="")
        return 0
    from randlora_pl.cli.data.get import get_verb

    verbs = {"get": get_verb, "check": check_verb, "show": show_verb}
    if args[0] not in verbs:
        hint = near(args[0], verbs)
        raise UserError(
            f"There is no verb data {args[0]}.{hint} Use data get, data check or data show; see: randlora-pl data -h"
        )
    return verbs[args[0]](args[1:])


def check_verb(args: list[str]) -> int:
    """Check data sets and print one table, and below it what is off.

    Returns:
        0 where all is as expected, 1 where something is off or missing.
    """
    parser = Parser("data check", "data")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--root", "--data.root")
    parser.add_argument("--every-image", "--every_image", action="store_true")
    parser.add_argument("--fast", action="store_true")
    typed = parser.parse_args(args)
    if typed.all == bool(typed.names):
        both = "names data sets and --all" if typed.all else "no data set is named"
        raise UserError(f"data check: {both}. Use: randlora-pl data check NAME ..., or --all")
    if typed.fast and typed.every_image:
        raise UserError("data check: --fast decodes no image and --every-image all of them; leave one out")
    chosen = [find(name) for name in typed.names] or [row for row in CATALOG.values() if not row.own]
    root = checked_root(typed, chosen, "data check")
    from randlora_pl.cli.fit import quieten
    from randlora_pl.utils.text.console import log_to_terminal

    quieten()
    log_to_terminal()
    from randlora_pl.data.check import check

    reports = []
    sample = None if typed.every_image else 0 if typed.fast else SAMPLE
    with counting(typed.every_image) as tick:
        for row in dict.fromkeys(row.name for row in chosen):
            reports.append(check(find(row), root, sample, tick))
    return print_reports(reports, typed.every_image)


def print_reports(reports: Sequence["Report"], every: bool = False) -> int:
    """Prints a table of what was found, and what is off.

    Args:
        reports: What was found.
        every: Whether all images were to be decoded.

    Returns:
        The exit code: 1 where something is off or missing.
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
    images, decoded = (sum(getattr(p, key) for r in reports for p in r.splits) for key in ("images", "decoded"))
    if decoded < images and not every:
        print(f"{decoded:,} of {images:,} images were decoded; --every-image decodes all")
    sets = "1 data set" if len(reports) == 1 else f"{len(reports)} data sets"
    print(f"{sets}: {len(reports) - len(missing) - len(off)} as expected, {len(off)} off, {len(missing)} missing")
    return 1 if off or missing else 0


def _per_class(count: tuple[str, int] | None) -> str:
    if count is None:
        return ""
    name, images = count
    short = name if len(name) <= 26 else f"{name[:12]}...{name[-11:]}"  # long names differ at their ends
    return f"{images:,} ({short})"


def show_verb(args: list[str]) -> int:
    """Draw the contact sheet of a data set, and print its splits and prompts."""
    parser = Parser("data show", "data")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--root", "--data.root")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shots", type=int, default=SHOTS)
    typed = parser.parse_args(args)
    row = find(typed.name)
    if not 1 <= typed.shots <= MOST_SHOTS:
        raise UserError(f"data show: --shots is {typed.shots}, give a number from 1 to {MOST_SHOTS}")
    output = _output(row, typed.output)
    root = checked_root(typed, [row], "data show")
    if not present(row, root):
        raise UserError(how_to_get(row, root))
    from randlora_pl.cli.fit import quieten
    from randlora_pl.utils.text.console import log_to_terminal

    quieten()
    log_to_terminal()
    from randlora_pl.data.contact_sheet import Sheet

    sheet = Sheet.of(row, root, typed.shots)
    sheet.write(output)
    print(f"{row.name}: {row.title}")
    print(sheet.caption)
    print(f"Prompts ({len(sheet.prompts)}), here for the class {sheet.names[0]!r}:")
    for prompt in sheet.prompts:
        print(f"  {printable(prompt)}")
    print(f"\nContact sheet: {output}")
    return 0


def _output(row: Row, named: Path | None) -> Path:
    """The file to write; one that was named must be new."""
    if named is None:
        return Path(f"contact-sheet-{row.name}.png")
    if named.suffix.lower() != ".png":
        raise UserError(f"--output is {named}: a contact sheet is a PNG file, for example {row.name}.png")
    if named.exists():
        raise UserError(f"{named} exists; give another --output, nothing is overwritten.")
    if not named.parent.is_dir():
        raise UserError(f"The folder {named.parent} does not exist; make it first: mkdir -p {named.parent}")
    return named


def checked_root(typed: argparse.Namespace, rows: Sequence[Row], verb: str) -> Path:
    """The folder of the data sets.

    Raises:
        UserError: It is needed but was not given, or is not there.
    """
    if typed.root is None:
        for row in rows:
            if row.own:
                where = row.source.replace("--data.root", "--root")
                raise UserError(f"The data set {row.name!r} needs a root: randlora-pl {verb} {row.name} {where}")
        return default_root()
    root = root_of(typed.root)
    if not root.exists() and not any(may_be_read(row, root) for row in rows):
        if rows[0].own:
            raise UserError(f"--root {root} does not exist; expected {rows[0].layout}")
        raise UserError(f"--root {root} does not exist; it is the folder that holds {rows[0].layout or 'the data'}")
    return root


@contextmanager
def counting(shown: bool, text: str = "{task.completed:,} images decoded", total: int | None = None) -> Iterator[Any]:
    """A function that counts images up on the terminal, where somebody watches a long command.

    Args:
        shown: Whether the command may be long.
        text: What to show, with ``{task.completed}``.
        total: What it counts up to; None: nobody knows.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(text), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
