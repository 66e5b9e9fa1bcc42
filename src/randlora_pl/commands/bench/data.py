"""``bench data``: speed of the input pipeline on this machine."""

from typing import Annotated, Any

from randlora_pl.commands.bench import measuring
from randlora_pl.commands.common.terminal import check_output, check_parent
from randlora_pl.commands.data import checked_root
from randlora_pl.data.catalog.registry import find, how_to_get, present
from randlora_pl.data.locations import root_of
from randlora_pl.data.validate import format_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors
from randlora_pl.utils.options import Count, File, Option, Root
from randlora_pl.utils.text import table


def data(
    name: str | None = None,
    *,
    root: Root = None,
    image_size: Annotated[Count, Option("PIXELS")] = 224,
    batch_size: Count = 64,
    workers: Count = 2,
    images: Count = 1024,
    rounds: Count = 5,
    output: File | None = None,
) -> int:
    """Measure the images per second of each stage of the input pipeline, and of plain torchvision.

    Examples:
        randlora-pl bench data digits

    Args:
        name: Dataset (randlora-pl datasets)
        image_size: Height and width of the images
        batch_size: Images per batch
        workers: Processes that load batches
        images: Images per round
        rounds: Number of measurements, for median and extremes
        output: New JSON file for the results
    """
    if name is None and root is None:
        raise UserError("bench data needs a dataset. Use: randlora-pl bench data NAME, or --root PATH")
    row = find(name or format_of(root_of(root or "")))
    if row.captions:
        raise UserError(f"bench data measures datasets with classes; {row.name} has captions")
    from randlora_pl.lab.bench.costs import batches_ahead

    least = (batches_ahead(workers) + 2) * batch_size
    if images < least:
        raise UserError(
            f"--images {images} is too few to measure {workers} workers with batches of "
            f"{batch_size}; give {least} or more"
        )
    if output is not None:
        check_output(output)
        check_parent(output)
    folder = checked_root(root, [row], "bench data")
    if not present(row, folder):
        raise UserError(how_to_get(row, folder))
    from randlora_pl.data.module import ImageData
    from randlora_pl.lab.bench.costs import Spread, in_turns, machine, ratios
    from randlora_pl.lab.bench.pipeline import PLAIN, cases

    loaded = ImageData(
        dataset=row.name, root=str(folder), batch_size=batch_size, image_size=image_size,
        steps=images // batch_size, cache_images=False, num_workers=workers,
    )  # fmt: skip
    loaded.setup("fit")
    if (there := len(loaded.samples("train"))) < least:
        raise UserError(
            f"{row.name} has {there:,} training images, and {least} are needed to measure {workers} workers with "
            f"batches of {batch_size}. Set --batch-size or --workers lower."
        )
    measured = cases(loaded, workers)
    facts = machine()
    print(
        f"{row.name}: {rounds} rounds of {loaded.plan.samples_drawn if loaded.plan else 0:,} images at "
        f"{image_size} pixels, in turns; {facts['processor']}, {facts['cores']} cores"
    )
    with measuring((rounds + 1) * len(measured)) as tick:
        rates = in_turns({case.name: case.run for case in measured}, rounds, lambda _: tick(1))
    rows: list[tuple[str, ...]] = []
    report: dict[str, dict[str, Any]] = {}
    for case in measured:
        speed, ratio = Spread.over(rates[case.name]), ratios(rates[case.name], rates[PLAIN])
        rows.append((case.name, f"{speed:,.0f}", f"{ratio:.2f}" if case.whole else "", case.what))
        report[case.name] = {"images_per_second": rates[case.name]}
        if case.whole:
            report[case.name]["times_plain"] = ratio.median
    print(table(("stage", "images/s, median (least .. most)", "times plain", "what is counted"), rows))
    if output is not None:
        from randlora_pl.lab.bench.report import write_json

        options = {
            "image_size": image_size, "batch_size": batch_size, "workers": workers, "images": images, "rounds": rounds,
        }  # fmt: skip
        with disk_errors(output):
            write_json({"dataset": row.name, "options": options, "machine": facts, "stages": report}, output)
        print(f"\nResults: {output}")
    return 0
