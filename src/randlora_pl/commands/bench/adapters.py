"""``bench adapters``: growth of the cost of adapted layers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from randlora_pl.commands.bench import JSON, PICTURE, TABLE, Timing, in_folder, machine_line, measuring
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Count, Option, Words
from randlora_pl.utils.text import duration, table


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
    from randlora_pl.lab.bench import sweeps as bench
    from randlora_pl.lab.bench.costs import Gemm
    from randlora_pl.lab.bench.methods import chosen
    from randlora_pl.lab.bench.report import curves, markdown, sweep_cells, write_csv, write_figure, write_json
    from randlora_pl.lab.bench.steps import measure, ticks
    from randlora_pl.lab.bench.train import dtype_of

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
        found: list[bench.Reading] = []
        total = sum(ticks(len(bench.methods_at(sweep, names)), timing.rounds) for sweep, _ in points)
        with measuring(total) as tick:
            for sweep, point in points:
                these = bench.methods_at(sweep, names)
                made, missing = bench.cases(point, these, device, timing.precision)
                measured = measure(made, gemm, timing.rounds, lambda _: tick(1)) + missing
                found.append(bench.Reading(sweep, point, sorted(measured, key=lambda one: names.index(one.name))))
                keep(list(found))
        return found

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
