"""Measure the speed of this machine. Everything compared is timed in turns, in one run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from randlora_pl.commands.common import check_output, check_parent, counting
from randlora_pl.commands.data import checked_root
from randlora_pl.data.catalog import find, how_to_get, present
from randlora_pl.data.locations import root_of
from randlora_pl.data.validate import format_of
from randlora_pl.run.run_folder import check_new, missing_folders, output_folder, remove_folder
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files import disk_errors, parse_yaml, write_text
from randlora_pl.utils.options import Count, File, Option, Probability, Root, Words
from randlora_pl.utils.text import duration, table

JSON, TABLE, PICTURE = "bench.json", "table.md", "bench.png"
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Options of all measurements.

    Attributes:
        precision: bf16: autocast. bf16-frozen: frozen weights in bfloat16, too
        rounds: Number of measurements of everything
        threads: CPU threads of PyTorch (default: its own choice)
        device: Device of the models (default: cuda if available)
        output: New folder for bench.json, table.md and bench.png (default: runs/bench-NAME/TIME)
    """

    precision: Literal["32", "bf16", "bf16-frozen"] = "32"
    rounds: Count = 3
    threads: Count | None = None
    device: Literal["cpu", "cuda"] | None = None
    output: Annotated[str | None, Option("DIR", read=check_new)] = None

    @property
    def numbers(self) -> str:
        """Description of the precision."""
        autocast = "bfloat16 autocast"
        return {"32": "float32", "bf16": autocast, "bf16-frozen": f"{autocast} and frozen weights"}[self.precision]

    def prepare(self) -> tuple[str, dict[str, Any]]:
        """Set the threads; return the device, and facts about the machine."""
        import torch

        from randlora_pl.lab.bench import machine

        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here (see: randlora-pl doctor); use --device cpu")
        if self.threads:
            torch.set_num_threads(self.threads)
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu"), machine()


def measuring(total: int) -> AbstractContextManager[Any]:
    """Return the progress of measurements on the terminal."""
    return counting(True, "{task.completed} of {task.total} measurements", total)


def machine_line(facts: dict[str, Any], device: str) -> str:
    """Return a short description of the machine for tables."""
    name = facts["gpu"] if device == "cuda" else f"{facts['processor']}, {facts['threads']} threads"
    return f"{name}, torch {facts['torch']}"


def in_folder(
    output: str | None,
    verb: str,
    work: Callable[[Callable[[T], None]], T],
    note: Callable[[T, Path], None],
    finish: Callable[[T, Path], None],
) -> None:
    """Run the work and write its results to a new folder; an interruption keeps finished ones.

    Args:
        output: The requested folder; None for ``runs/bench-VERB/TIME``.
        verb: What is measured.
        work: Function that gets a callback for intermediate results; returns all results.
        note: Function that writes intermediate results.
        finish: Function that writes and prints the results.
    """
    new = Path(output or f"runs/bench-{verb}").absolute()
    missing = missing_folders(new.parent if output else new)
    folder = output_folder(output, f"bench-{verb}")
    kept: list[T] = []

    def keep(results: T) -> None:
        kept[:] = [results]
        note(results, folder)

    try:
        keep(work(keep))
        finish(kept[0], folder)
    except BaseException as stop:
        if not kept:
            remove_folder(folder, missing)
        elif isinstance(stop, KeyboardInterrupt):
            finish(kept[0], folder)
            raise KeyboardInterrupt(f"the finished results are in {folder}") from stop
        raise
    print(f"\nResults: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")


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
    from randlora_pl.lab.bench import batches_ahead

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
    from randlora_pl.lab.bench import Spread, in_turns, machine, ratios
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


Overrides = Annotated[str, Option("OPTIONS", "Changes to a decoder's configuration, such as '{num_hidden_layers: 4}'")]


def train(
    words: Words,
    *,
    model: str = "vit_base_patch32_224",
    library: Literal["timm", "open_clip", "transformers"] | None = None,
    batch_size: Count | None = None,
    tokens: Count = 256,
    overrides: Overrides = "{}",
    dropout: Annotated[float, Probability] = 0.0,
    methods: Sequence[str] = (),
    targets: Sequence[str] = (),
    rss: bool = False,
    timing: Timing = Timing(rounds=5),
) -> int:
    """Time whole training steps of full fine-tuning and of adapters, in turns.

    The weights and the data are random.

    Examples:
        randlora-pl bench train
        randlora-pl bench train --model Qwen/Qwen2-0.5B-Instruct --methods lora randlora

    Args:
        model: A model of timm, the image tower of an open_clip model, or a decoder such as Qwen/Qwen2-0.5B-Instruct
        library: Library of the model, if two know the name
        batch_size: Images per step (default: 64), or texts (default: 4)
        tokens: Tokens per text
        dropout: Dropout on the input of the adapters' paths
        methods: Also: randlora-low (memory: low) dora vera nola adalora pissa loraxs hydralora hira shira kradapter oft
            svft pranc peft-dora peft-vera (default: full lora randlora randlora-hadamard randlora-ternary peft-lora
            peft-randlora)
        targets: Layers to adapt, as in --model.targets (default: qkv fc1 fc2, as in the paper). all selects every
            linear layer of the blocks, conv their convolutions
        rss: Also measure the resident set of a process per method, which takes as long again
    """
    device, facts = timing.prepare()
    import yaml

    from randlora_pl.adapters.select import DEFAULT_TARGETS
    from randlora_pl.lab.bench import chosen, rss_elsewhere
    from randlora_pl.lab.bench.report import as_json, bars, cells, markdown, write_figure, write_json
    from randlora_pl.lab.bench.steps import (
        Measured,
        Setup,
        Training,
        estimated_seconds,
        library_of,
        measure,
        one_training,
        ticks,
    )

    try:
        changes = parse_yaml(overrides)
    except yaml.YAMLError:
        changes = None
    if not isinstance(changes, dict) or not all(isinstance(name, str) for name in changes):
        raise UserError(f"--overrides is {overrides!r}: give options of the model such as '{{num_hidden_layers: 4}}'")
    names = chosen(methods)
    library = library or library_of(model)
    batch_size = batch_size or (4 if library == "transformers" else 64)
    setup = Setup(
        model, library, batch_size, timing.precision, device, timing.threads or 0, list(targets) or None, tokens,
        changes, dropout,
    )  # fmt: skip
    if setup.overrides and library != "transformers":
        raise UserError(f"--overrides needs a decoder, but {model} is a model of {library}. Remove the option")
    training = Training(setup)
    gemm = training.gemm()
    rate = gemm.rate()
    estimate = estimated_seconds(training.forward_flops(), rate, len(names), timing.rounds)
    estimate += 20 * len(names) * rss
    what = f"{model} ({library}), {training.words}, {timing.numbers}"
    what += "".join(f", {name} {value}" for name, value in (setup.overrides or {}).items())
    what += f", dropout {dropout}" if dropout else ""
    where = machine_line(facts, device)
    adapted = " ".join(targets or DEFAULT_TARGETS)
    print(f"{what}; random weights\non {where}: {rate / 1e9:,.0f} GFLOP/s at best")
    print(f"{len(training.layers)} adapted layers ({adapted})")
    print(f"{len(names)} methods, {timing.rounds} rounds in turns: about {duration(estimate)}")
    sets: dict[str, int | None] = {}

    def work(keep: Callable[[list[Measured]], None]) -> list[Measured]:
        cases, missing = training.cases(names)

        def whole(results: list[Measured]) -> list[Measured]:
            for one in results:
                one.rss = sets.get(one.name)
            return sorted([*results, *missing], key=lambda one: names.index(one.name))

        with measuring(ticks(len(cases), timing.rounds) + len(cases) * rss) as tick:
            if rss:
                for case in cases:
                    tick(1)
                    sets[case.name] = rss_elsewhere(one_training, setup, case.name)
            measured = measure(cases, gemm, timing.rounds, lambda _: tick(1), lambda results: keep(whole(results)))
        return whole(measured)

    about: dict[str, Any] = {
        "command": words.command("bench train", "--output"),
        "machine": facts,
        "setup": vars(setup),
        "gemm_flops_per_second": rate,
    }
    title = f"{what}, adapted: {adapted}, on {where}"

    def note(results: list[Measured], folder: Path) -> None:
        write_json(about | {"cases": as_json(results)}, folder / JSON)

    def finish(results: list[Measured], folder: Path) -> None:
        rounds = max((len(one.seconds) for one in results), default=0)
        remark = (
            f"Times are medians (min..max) of {rounds} interleaved rounds. Ratios are computed per round. Saved: bytes "
            "kept for the backward pass, without parameters and batch. GFLOP: matrix products, convolutions and "
            "attention."
        )
        header, rows = cells(results)
        write_text(folder / TABLE, f"{markdown(title, header, rows, about['command'])}\n{remark}\n")
        write_figure(bars(title, results), folder / PICTURE)
        print(f"\n{table(header, rows)}\n\n{remark}")

    in_folder(timing.output, "train", work, note, finish)
    return 0


def adapters(
    words: Words,
    *,
    sweeps: Sequence[str] = (),
    widths: Sequence[Count] = (),
    tokens: Sequence[Count] = (),
    ranks: Sequence[Count] = (),
    depths: Sequence[Count] = (),
    basis: Literal["uniform", "hadamard", "ternary"] | None = None,
    sparsity: Annotated[Sequence[str], Option("S")] = (),
    methods: Sequence[str] = (),
    timing: Timing = Timing(),
) -> int:
    """Time adapted layers against width, tokens, number of bases, depth and sparsity of the bases.

    The weights and the data are random.

    Examples:
        randlora-pl bench adapters
        randlora-pl bench adapters --basis ternary --sparsity 6 28 sqrt 100

    Args:
        sweeps: width tokens rank depth sparsity (default: all but sparsity)
        widths: Features
        tokens: Tokens per batch
        ranks: Ranks. The number of bases is width / rank
        depths: Numbers of layers
        basis: Only RandLoRA with these bases, beside full fine-tuning. ternary sweeps the sparsity, and shows additions
            beside dense products
        sparsity: Sparsities of ternary bases: +1 and -1 have probability 1/S each. sqrt is the square root of D
        methods: See: randlora-pl bench train --help. Also: randlora-ternary-dense
    """
    where, facts = timing.prepare()
    from randlora_pl.lab.bench import Gemm, chosen
    from randlora_pl.lab.bench import report as bench
    from randlora_pl.lab.bench.report import curves, markdown, sweep_cells, write_csv, write_figure, write_json
    from randlora_pl.lab.bench.steps import dtype_of, measure, ticks

    known = bench.DEFAULTS
    for name in sweeps:
        if name not in known:
            raise UserError(f"--sweeps: unknown sweep {name!r}.{near(name, known)} Known: {' '.join(known)}")
    names = chosen(methods or bench.BASES.get(basis or "", ()))
    shares: list[Any] = [int(s) if s.isdecimal() else s for s in sparsity]
    if wrong := [s for s in shares if s != "sqrt" and (not isinstance(s, int) or not 2 <= s <= 1_000_000)]:
        raise UserError(f"sparsity is {wrong[0]!r}. Set an integer from 2 to 1,000,000, or 'sqrt'.")
    if shares and not any("ternary" in name for name in names):
        raise UserError("--sparsity is for ternary bases only. Add --basis ternary.")
    sparse = shares or basis == "ternary"
    swept = sweeps or [name for name in known if (name == "sparsity") == bool(sparse)]
    given = {"width": widths, "tokens": tokens, "rank": ranks, "depth": depths, "sparsity": shares}
    ranges: dict[str, list[Any]] = {
        name: list(values) or known[name] for name, values in given.items() if name in swept
    }
    for rank in ranges.get("rank", ()):
        if rank > bench.Point().width:
            raise UserError(f"--ranks: {rank} is larger than the width of the layers, {bench.Point().width}")
    points = bench.readings(ranges)
    import torch

    device = torch.device(where)
    gemm = Gemm(device, dtype_of(timing.precision))
    rate, here = gemm.rate(), machine_line(facts, where)
    middle = ", ".join(f"{name} {value:,}" for name, value in vars(bench.Point()).items() if name != "sparsity")
    what = f"Square linear layers around {middle}, {timing.numbers}"
    print(f"{what}\non {here}: {rate / 1e9:,.0f} GFLOP/s at best")
    estimate = bench.estimated_seconds(points, len(names), timing.rounds, rate)
    print(f"{len(points)} points, {len(names)} methods, {timing.rounds} rounds: about {duration(estimate)}")
    typed = words.command("bench adapters", "--output")
    about = {"command": typed, "machine": facts, "gemm_flops_per_second": rate}

    def work(keep: Callable[[list[bench.Reading]], None]) -> list[bench.Reading]:
        finished: list[bench.Reading] = []
        total = sum(ticks(len(bench.methods_at(sweep, names)), timing.rounds) for sweep, _ in points)
        with measuring(total) as tick:
            for sweep, point in points:
                these = bench.methods_at(sweep, names)
                made, missing = bench.cases(point, these, device, timing.precision)
                measured = measure(made, gemm, timing.rounds, lambda _: tick(1)) + missing
                finished.append(bench.Reading(sweep, point, sorted(measured, key=lambda one: names.index(one.name))))
                keep(list(finished))
        return finished

    def note(results: list[bench.Reading], folder: Path) -> None:
        rows = [row for reading in results for row in reading.as_rows()]
        write_json(about | {"rows": rows}, folder / JSON)
        write_csv(rows, folder / "bench.csv")

    def finish(results: list[bench.Reading], folder: Path) -> None:
        text, shown = [], []
        for sweep in dict.fromkeys(reading.sweep for reading in results):
            header, rows = sweep_cells(results, sweep)
            text.append(markdown(f"{what}, on {here}: {sweep}", header, rows, typed))
            shown.append(table(header, rows))
        remark = (
            f"Cells: milliseconds of a forward and a backward pass (median of {timing.rounds} rounds in turns), "
            "relative to full fine-tuning, memory kept for the backward pass (on a GPU: the allocator's peak)."
        )
        write_text(folder / TABLE, "\n".join([*text, remark + "\n"]))
        write_figure(curves(f"{what}\non {here}", results), folder / PICTURE)
        print("\n" + "\n\n".join([*shown, remark]))

    in_folder(timing.output, "adapters", work, note, finish)
    return 0
