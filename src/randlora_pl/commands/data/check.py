"""``data check`` and ``data show``: check of a dataset, and a contact sheet of its images."""

from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser, check_output, check_parent
from randlora_pl.commands.common.progress import counting
from randlora_pl.commands.data.report import SAMPLE, checked_root, parse_names, print_reports
from randlora_pl.data.catalog.coop import SPLITS, has_coop, with_split
from randlora_pl.data.catalog.registry import CATALOG, DatasetSpec, how_to_get, present
from randlora_pl.language.dataset_facts import find_images
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text.formatting import printable

SHOTS = 4
"""Images per class on a contact sheet."""

MOST_SHOTS = 50


def check_verb(args: list[str]) -> int:
    """Check datasets and print one table, with the problems below it.

    Returns:
        0 if all is as expected, 1 if something is wrong or missing.
    """
    typed = parse_names("check", args, every_image=False, fast=False, split=SPLITS)
    if typed.fast and typed.every_image:
        raise UserError("data check: --fast and --every-image exclude each other. Remove one")
    split = typed.split or SPLITS[0]
    known = [row for row in CATALOG.values() if not row.own and (split == SPLITS[0] or has_coop(row))]
    chosen = [with_split(find_images(name), split) for name in typed.names] or [with_split(row, split) for row in known]
    root = checked_root(typed.root, chosen, "data check")
    from randlora_pl.data.check import check

    reports = []
    sample = None if typed.every_image else 0 if typed.fast else SAMPLE
    with counting(typed.every_image) as tick:
        for row in {row.name: row for row in chosen}.values():
            reports.append(check(row, root, sample, tick))
    return print_reports(reports, typed.every_image)


def show_verb(args: list[str]) -> int:
    """Draw the contact sheet of a dataset, and print its splits and prompts."""
    parser = CommandParser("data show")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--root", "--data.root")
    parser.add_options(output=Path, shots=SHOTS)
    typed = parser.parse_args(args)
    row = find_images(typed.name)
    if not 1 <= typed.shots <= MOST_SHOTS:
        raise UserError(f"data show: --shots is {typed.shots}, give a number from 1 to {MOST_SHOTS}")
    output = _output(row, typed.output)
    root = checked_root(typed.root, [row], "data show")
    if not present(row, root):
        raise UserError(how_to_get(row, root))
    from randlora_pl.data.contact_sheet import Sheet
    from randlora_pl.tasks.images import UsedPrompts
    from randlora_pl.tasks.vision_language import CAPTION

    sheet = Sheet.of(row, root, typed.shots)
    sheet.write(output)
    print(f"{row.name}: {row.title}")
    print(sheet.caption)
    if not row.captions:
        print(f"Prompts of VisionLanguageTask, the default: {UsedPrompts([CAPTION], [CAPTION]).summary()}")
    also = "" if row.captions else " of TextHeadTask, zeroshot and --model.eval_prompts ensemble"
    print(f"Prompts{also} ({len(sheet.prompts)}), here for the class {sheet.names[0]!r}:")
    for prompt in sheet.prompts:
        print(f"  {printable(prompt)}")
    print(f"\nContact sheet: {output}")
    return 0


def _output(row: DatasetSpec, named: Path | None) -> Path:
    """Return the file to write; a typed one must be new."""
    if named is None:
        return Path(f"contact-sheet-{row.name}.png")
    if named.suffix.lower() != ".png":
        raise UserError(f"--output is {named}: a contact sheet is a PNG file, for example {row.name}.png")
    check_output(named)
    check_parent(named)
    return named
