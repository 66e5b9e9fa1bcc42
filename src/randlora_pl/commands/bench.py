"""Measure the speed of this machine. Everything compared is timed interleaved, in one run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from randlora_pl.commands.common import counting
from randlora_pl.run.run_folder import check_new, missing_folders, output_folder, remove_folder
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files import parse_yaml, write_text
from randlora_pl.utils.options import Count, Option, Probability, Words
from randlora_pl.utils.text import table

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


def _machine_line(facts: dict[str, Any], device: str) -> str:
    """Return a short description of the machine for tables."""
    name = facts["gpu"] if device == "cuda" else f"{facts['processor']}, {facts['threads']} threads"
    return f"{name}, torch {facts['torch']}"


@contextmanager
def _new_folder(
    output: str | None, verb: str, note: Callable[[T, Path], None], finish: Callable[[T, Path], None]
) -> Iterator[Callable[[T], None]]:
    """Yield a function that ``note`` writes the results so far with; the last ones are finished, even after Ctrl-C."""
    new = Path(output or f"runs/bench-{verb}").absolute()
    missing = missing_folders(new.parent if output else new)
    folder = output_folder(output, f"bench-{verb}")
    kept: list[T] = []

    def keep(results: T) -> None:
        kept[:] = [results]
        note(results, folder)

    try:
        yield keep
        finish(kept[0], folder)
    except BaseException as stop:
        if not kept:
            remove_folder(folder, missing)
        elif isinstance(stop, KeyboardInterrupt):
            finish(kept[0], folder)
            raise KeyboardInterrupt(f"the finished results are in {folder}") from stop
        raise
    print(f"\nResults: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")


Overrides = Annotated[str, Option("OPTIONS", "Changes to a decoder's configuration, such as '{num_hidden_layers: 4}'")]


def train(
    words: Words,
    *,
    model: str = "vit_base_patch32_224",
    batch_size: Count | None = None,
    tokens: Count = 256,
    overrides: Overrides = "{}",
    dropout: Annotated[float, Probability] = 0.0,
    methods: Sequence[str] = (),
    targets: Sequence[str] = (),
    timing: Timing = Timing(rounds=5),
) -> int:
    """Time whole training steps of full fine-tuning and of adapters, interleaved.

    The weights and the data are random.

    Examples:
        randlora-pl bench train
        randlora-pl bench train --model Qwen/Qwen2-0.5B-Instruct --methods lora randlora

    Args:
        model: A model of timm, the image tower of an open_clip model, or a decoder such as Qwen/Qwen2-0.5B-Instruct
        batch_size: Images per step (default: 64), or texts (default: 4)
        tokens: Tokens per text
        dropout: Dropout on the input of the adapters' paths
        methods: Also: randlora-low (memory: low) dora vera nola adalora pissa loraxs hydralora hira shira kradapter oft
            svft pranc peft-dora peft-vera (default: full lora randlora randlora-hadamard randlora-ternary peft-lora
            peft-randlora)
        targets: Layers to adapt, as in --model.targets (default: qkv fc1 fc2, as in the paper). all selects every
            linear layer of the blocks, conv their convolutions
    """
    device, facts = timing.prepare()
    import yaml

    from randlora_pl.adapters.select import DEFAULT_TARGETS
    from randlora_pl.lab.bench import chosen, report, steps

    try:
        changes = parse_yaml(overrides)
    except yaml.YAMLError:
        changes = None
    if not isinstance(changes, dict) or not all(isinstance(name, str) for name in changes):
        raise UserError(f"--overrides is {overrides!r}: give options of the model such as '{{num_hidden_layers: 4}}'")
    names = chosen(methods)
    library = steps.library_of(model)
    batch_size = batch_size or (4 if library == "transformers" else 64)
    setup = steps.Setup(
        model, library, batch_size, timing.precision, device, list(targets) or None, tokens, changes, dropout
    )  # fmt: skip
    if setup.overrides and library != "transformers":
        raise UserError(f"--overrides needs a decoder, but {model} is a model of {library}. Remove the option")
    training = steps.Training(setup)
    gemm = training.gemm()
    rate = gemm.rate()
    what = f"{model} ({library}), {training.words}, {timing.numbers}"
    what += "".join(f", {name} {value}" for name, value in (setup.overrides or {}).items())
    what += f", dropout {dropout}" if dropout else ""
    where = _machine_line(facts, device)
    adapted = " ".join(targets or DEFAULT_TARGETS)
    print(f"{what}; random weights\non {where}: {rate / 1e9:,.0f} GFLOP/s at best")
    print(f"{len(training.layers)} adapted layers ({adapted})")
    print(f"{len(names)} methods, {timing.rounds} interleaved rounds")
    about: dict[str, Any] = {
        "command": words.command("bench train", "--output"),
        "machine": facts,
        "setup": vars(setup),
        "gemm_flops_per_second": rate,
    }
    title = f"{what}, adapted: {adapted}, on {where}"

    def note(results: list[steps.Measured], folder: Path) -> None:
        report.write_json(about | {"cases": report.as_json(results)}, folder / JSON)

    def finish(results: list[steps.Measured], folder: Path) -> None:
        rounds = max((len(one.seconds) for one in results), default=0)
        remark = (
            f"Times are medians (min..max) of {rounds} interleaved rounds. Ratios are computed per round. Saved: bytes "
            "kept for the backward pass, without parameters and batch. GFLOP: matrix products, convolutions and "
            "attention."
        )
        header, rows = report.cells(results)
        write_text(folder / TABLE, f"{report.markdown(title, header, rows, about['command'])}\n{remark}\n")
        report.write_figure(report.bars(title, results), folder / PICTURE)
        print(f"\n{table(header, rows)}\n\n{remark}")

    with _new_folder(timing.output, "train", note, finish) as keep:
        cases, missing = training.cases(names)

        def keep_all(results: list[steps.Measured]) -> None:
            keep(sorted([*results, *missing], key=lambda one: names.index(one.name)))

        with counting("measurements", steps.ticks(len(cases), timing.rounds)) as tick:
            keep_all(steps.measure(cases, gemm, timing.rounds, lambda _: tick(1), keep_all))
    return 0


def adapters(
    words: Words,
    *,
    sweeps: Sequence[str] = (),
    widths: Sequence[Count] = (),
    tokens: Sequence[Count] = (),
    ranks: Sequence[Count] = (),
    depths: Sequence[Count] = (),
    sparsity: Annotated[Sequence[str], Option("S")] = (),
    methods: Sequence[str] = (),
    timing: Timing = Timing(),
) -> int:
    """Time adapted layers against width, tokens, number of bases, depth and sparsity of the bases.

    The weights and the data are random.

    Examples:
        randlora-pl bench adapters
        randlora-pl bench adapters --methods full randlora-ternary --sparsity 6 28 sqrt 100

    Args:
        sweeps: width tokens rank depth sparsity (default: all but sparsity)
        widths: Features
        tokens: Tokens per batch
        ranks: Ranks. The number of bases is width / rank
        depths: Numbers of layers
        sparsity: Sparsities of ternary bases: +1 and -1 have probability 1/S each. sqrt is the square root of D
        methods: See: randlora-pl bench train --help. Also: randlora-ternary-dense, without the faster additions
    """
    where, facts = timing.prepare()
    from randlora_pl.lab.bench import Gemm, chosen, report, steps

    known = report.DEFAULTS
    for name in sweeps:
        if name not in known:
            raise UserError(f"--sweeps: unknown sweep {name!r}.{near(name, known)} Known: {' '.join(known)}")
    names = chosen(methods)
    shares: list[Any] = [int(s) if s.isdecimal() else s for s in sparsity]
    if wrong := [s for s in shares if s != "sqrt" and (not isinstance(s, int) or not 2 <= s <= 1_000_000)]:
        raise UserError(f"sparsity is {wrong[0]!r}. Set an integer from 2 to 1,000,000, or 'sqrt'.")
    if (shares or "sparsity" in sweeps) and not any("ternary" in name for name in names):
        raise UserError("sparsity is for ternary bases only. Add --methods randlora-ternary.")
    swept = sweeps or [name for name in known if (name == "sparsity") == bool(shares)]
    given = {"width": widths, "tokens": tokens, "rank": ranks, "depth": depths, "sparsity": shares}
    ranges: dict[str, list[Any]] = {
        name: list(values) or known[name] for name, values in given.items() if name in swept
    }
    for rank in ranges.get("rank", ()):
        if rank > report.Point().width:
            raise UserError(f"--ranks: {rank} is larger than the width of the layers, {report.Point().width}")
    points = report.readings(ranges)
    import torch

    device = torch.device(where)
    gemm = Gemm(device, steps.dtype_of(timing.precision))
    rate, here = gemm.rate(), _machine_line(facts, where)
    middle = ", ".join(f"{name} {value:,}" for name, value in vars(report.Point()).items() if name != "sparsity")
    what = f"Square linear layers around {middle}, {timing.numbers}"
    print(f"{what}\non {here}: {rate / 1e9:,.0f} GFLOP/s at best")
    print(f"{len(points)} points, {len(names)} methods, {timing.rounds} rounds")
    typed = words.command("bench adapters", "--output")
    about = {"command": typed, "machine": facts, "gemm_flops_per_second": rate}

    def note(results: list[report.Reading], folder: Path) -> None:
        rows = [row for reading in results for row in reading.as_rows()]
        report.write_json(about | {"rows": rows}, folder / JSON)
        report.write_csv(rows, folder / "bench.csv")

    def finish(results: list[report.Reading], folder: Path) -> None:
        text, shown = [], []
        for sweep in dict.fromkeys(reading.sweep for reading in results):
            header, rows = report.sweep_cells(results, sweep)
            text.append(report.markdown(f"{what}, on {here}: {sweep}", header, rows, typed))
            shown.append(table(header, rows))
        remark = (
            f"Cells: milliseconds of a forward and a backward pass (median of {timing.rounds} interleaved rounds), "
            "relative to full fine-tuning, memory kept for the backward pass (on a GPU: the allocator's peak)."
        )
        write_text(folder / TABLE, "\n".join([*text, remark + "\n"]))
        report.write_figure(report.curves(f"{what}\non {here}", results), folder / PICTURE)
        print("\n" + "\n\n".join([*shown, remark]))

    finished: list[report.Reading] = []
    total = sum(steps.ticks(len(report.methods_at(sweep, names)), timing.rounds) for sweep, _ in points)
    with (
        _new_folder(timing.output, "adapters", note, finish) as keep,
        counting("measurements", total) as tick,
    ):
        for sweep, point in points:
            these = report.methods_at(sweep, names)
            made, missing = report.cases(point, these, device, timing.precision)
            measured = steps.measure(made, gemm, timing.rounds, lambda _: tick(1)) + missing
            finished.append(report.Reading(sweep, point, sorted(measured, key=lambda one: names.index(one.name))))
            keep(list(finished))
    return 0


def batch(
    words: Words,
    *,
    model: str = "vit_base_patch32_224",
    methods: Sequence[str] = ("lora", "randlora-hadamard", "dora"),
    timing: Timing = Timing(),
) -> int:
    """Time batches of 32 images with 8 and 32 adapters, against one adapter for all and against single passes.

    The weights and the images are random.

    Examples:
        randlora-pl bench batch --methods lora

    Args:
        model: A model of timm, or the image tower of an open_clip model
        methods: See: randlora-pl bench train --help
    """
    where, facts = timing.prepare()
    from randlora_pl.lab.bench import batch as batches
    from randlora_pl.lab.bench import chosen, report, steps

    names, size = chosen(methods), max(batches.COUNTS)
    if odd := [name for name in names if name == "full" or name.startswith("peft-")]:
        raise UserError(f"--methods {odd[0]}: it has no adapter that a batch can share. Leave it out.")
    setup = steps.Setup(model, steps.library_of(model), size, timing.precision, where)
    typed, title = words.command("bench batch", "--output"), f"{model}, {size} images, {timing.numbers}"
    about = {"command": typed, "machine": facts, "model": model}

    def note(results: dict[str, tuple[str, batches.Seconds]], folder: Path) -> None:
        cases = [{"method": name, "applied": how, "seconds": own} for name, (how, own) in results.items()]
        report.write_json(about | {"cases": cases}, folder / JSON)

    def finish(results: dict[str, tuple[str, batches.Seconds]], folder: Path) -> None:
        header = ["method", "updates are applied", "ms with 1 adapter", "8 adapters", "32 adapters", "single passes"]
        rows = [[name, how, *batches.cells(own)] for name, (how, own) in results.items()]
        remark = "Cells: multiples of the time with one adapter (median, least .. most of the rounds)."
        text = report.markdown(f"{title}, on {_machine_line(facts, where)}", header, rows, typed)
        write_text(folder / TABLE, f"{text}\n{remark}\n")
        print(f"\n{table(header, rows)}\n\n{remark}")

    finished: dict[str, tuple[str, batches.Seconds]] = {}
    total = len(names) * timing.rounds * (len(batches.COUNTS) + 1)
    with _new_folder(timing.output, "batch", note, finish) as keep, counting("measurements", total) as tick:
        for name in names:
            training = steps.Training(setup)
            finished[training.label(name)] = batches.measure(training, name, timing.rounds, lambda _: tick(1))
            keep(dict(finished))
    return 0
