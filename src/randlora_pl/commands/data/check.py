"""``data check``: check of a dataset."""

from typing import Literal

from randlora_pl.commands.common.progress import counting
from randlora_pl.commands.data.report import SAMPLE, All, Names, check_names, checked_root, print_reports
from randlora_pl.data.catalog.coop import SPLITS, has_coop, with_split
from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.language.dataset_facts import find_images
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.option_types import Root


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
        0 if everything is as expected, 1 if something differs or is missing.
    """
    check_names("data check", names, all)
    if fast and every_image:
        raise UserError("data check: --fast and --every-image exclude each other. Remove one")
    known = [row for row in CATALOG.values() if not row.own and (split == SPLITS[0] or has_coop(row))]
    chosen = [with_split(find_images(name), split) for name in names] or [with_split(row, split) for row in known]
    folder = checked_root(root, chosen, "data check")
    from randlora_pl.data.check import check as checked

    reports = []
    sample = None if every_image else 0 if fast else SAMPLE
    with counting(every_image) as tick:
        for row in {row.name: row for row in chosen}.values():
            reports.append(checked(row, folder, sample, tick))
    return print_reports(reports, every_image)
