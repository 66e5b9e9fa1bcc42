"""``bench data``: speed of the input pipeline on this machine."""

from pathlib import Path
from typing import Any

from randlora_pl.commands.bench.common import measuring
from randlora_pl.commands.common.arguments import CommandParser, check_output, check_parent, check_positive
from randlora_pl.commands.data.report import checked_root
from randlora_pl.data.catalog.registry import find, how_to_get, present
from randlora_pl.data.locations import root_of
from randlora_pl.data.own_format import format_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import disk_errors
from randlora_pl.utils.text.tables import table


def data_verb(args: list[str]) -> int:
    """Measure images per second of each stage of the input pipeline, beside the plain torchvision pipeline."""
    parser = CommandParser("bench data")
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("--root", "--data.root")
    parser.add_options(image_size=224, batch_size=64, workers=2, images=1024, rounds=5, output=Path)
    typed = parser.parse_args(args)
    if typed.name is None and typed.root is None:
        raise UserError("bench data needs a dataset. Use: randlora-pl bench data NAME, or --root PATH")
    row = find(typed.name or format_of(root_of(typed.root)))
    if row.captions:
        raise UserError(f"bench data measures datasets with classes; {row.name} has captions")
    check_positive(typed, "image_size", "batch_size", "workers", "images", "rounds")
    from randlora_pl.lab.bench.timing import batches_ahead

    least = (batches_ahead(typed.workers) + 2) * typed.batch_size
    if typed.images < least:
        raise UserError(
            f"--images {typed.images} is too few to measure {typed.workers} workers with batches of "
            f"{typed.batch_size}; give {least} or more"
        )
    if typed.output is not None:
        check_output(typed.output)
        check_parent(typed.output)
    root = checked_root(typed.root, [row], "bench data")
    if not present(row, root):
        raise UserError(how_to_get(row, root))
    from randlora_pl.data.module import ImageData
    from randlora_pl.lab.bench.pipeline import PLAIN, cases
    from randlora_pl.lab.bench.timing import Spread, in_turns, machine, ratios

    data = ImageData(
        dataset=row.name, root=str(root), batch_size=typed.batch_size, image_size=typed.image_size,
        steps=typed.images // typed.batch_size, cache_images=False, num_workers=typed.workers,
    )  # fmt: skip
    data.setup("fit")
    if (there := len(data.samples("train"))) < least:
        raise UserError(
            f"{row.name} has {there:,} training images, and {least} are needed to measure {typed.workers} workers with "
            f"batches of {typed.batch_size}. Set --batch-size or --workers lower."
        )
    measured = cases(data, typed.workers)
    facts = machine()
    print(
        f"{row.name}: {typed.rounds} rounds of {data.plan.samples_drawn if data.plan else 0:,} images at "
        f"{typed.image_size} pixels, in turns; {facts['processor']}, {facts['cores']} cores"
    )
    with measuring((typed.rounds + 1) * len(measured)) as tick:
        rates = in_turns({case.name: case.run for case in measured}, typed.rounds, lambda _: tick(1))
    rows: list[tuple[str, ...]] = []
    report: dict[str, dict[str, Any]] = {}
    for case in measured:
        speed, ratio = Spread.of(rates[case.name]), ratios(rates[case.name], rates[PLAIN])
        rows.append((case.name, f"{speed:,.0f}", f"{ratio:.2f}" if case.whole else "", case.what))
        report[case.name] = {"images_per_second": rates[case.name]}
        if case.whole:
            report[case.name]["times_plain"] = ratio.median
    print(table(("stage", "images/s, median (least .. most)", "times plain", "what is counted"), rows))
    if typed.output is not None:
        from randlora_pl.lab.bench.report import write_json

        options = {name: value for name, value in vars(typed).items() if name not in ("name", "root", "output")}
        with disk_errors(typed.output):
            write_json({"dataset": row.name, "options": options, "machine": facts, "stages": report}, typed.output)
        print(f"\nResults: {typed.output}")
    return 0
