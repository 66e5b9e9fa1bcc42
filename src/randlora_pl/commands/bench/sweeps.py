"""``bench adapters``: growth of the cost of adapted layers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from randlora_pl.commands.bench import common
from randlora_pl.commands.bench.common import PRECISIONS, command, machine_line, measuring, parser_of, prepare
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.text.formatting import duration
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.lab.bench.sweeps import Reading

_OPTIONS = {"width": "widths", "tokens": "tokens", "rank": "ranks", "depth": "depths", "sparsity": "sparsity"}
_NOTE = (
    "Cells: milliseconds of a forward and a backward pass (median of {rounds} rounds in turns), relative to full "
    "fine-tuning, memory kept for the backward pass (on a GPU: the allocator's peak)."
)


def adapters_verb(args: list[str]) -> int:
    """Measure forward and backward passes of adapted linear layers by width, tokens, bases, depth and sparsity."""
    parser = parser_of("adapters", 3)
    numbers = [option for option in _OPTIONS.values() if option != "sparsity"]
    parser.add_options(sweeps=[str], methods=[str], basis=("uniform", "hadamard", "ternary"), sparsity=[str])
    parser.add_options(**{option: [int] for option in numbers})
    typed = parser.parse_args(args)
    facts = prepare(typed, numbers)
    from randlora_pl.adapters.random_bases import check_sparsity
    from randlora_pl.lab.bench.flops import Gemm
    from randlora_pl.lab.bench.methods import chosen
    from randlora_pl.lab.bench.report import curves, markdown, sweep_cells, write_csv, write_figure, write_json
    from randlora_pl.lab.bench.steps import measure, ticks
    from randlora_pl.lab.bench.sweeps import (
        BASES,
        DEFAULTS,
        Point,
        Reading,
        cases,
        estimated_seconds,
        methods_at,
        readings,
    )
    from randlora_pl.lab.bench.train import dtype_of

    for name in typed.sweeps or ():
        if name not in DEFAULTS:
            raise UserError(f"--sweeps: unknown sweep {name!r}.{near(name, DEFAULTS)} Known: {' '.join(DEFAULTS)}")
    names = chosen(typed.methods or BASES.get(typed.basis))
    typed.sparsity = [check_sparsity(int(s) if s.isdecimal() else s) for s in typed.sparsity or ()]
    if typed.sparsity and not any("ternary" in name for name in names):
        raise UserError("--sparsity is for ternary bases only. Add --basis ternary.")
    sparse = typed.sparsity or typed.basis == "ternary"
    of = typed.sweeps or [name for name in DEFAULTS if (name == "sparsity") == bool(sparse)]
    sweeps = {name: getattr(typed, option) or DEFAULTS[name] for name, option in _OPTIONS.items() if name in of}
    for rank in sweeps.get("rank", ()):
        if rank > Point().width:
            raise UserError(f"--ranks: {rank} is larger than the width of the layers, {Point().width}")
    points = readings(sweeps)
    import torch

    device = torch.device(typed.device)
    gemm = Gemm(device, dtype_of(typed.precision))
    rate, where = gemm.rate(), machine_line(facts, typed.device)
    middle = ", ".join(f"{name} {value:,}" for name, value in vars(Point()).items() if name != "sparsity")
    what = f"Square linear layers around {middle}, {PRECISIONS[typed.precision]}"
    print(f"{what}\non {where}: {rate / 1e9:,.0f} GFLOP/s at best")
    estimate = estimated_seconds(points, len(names), typed.rounds, rate)
    print(f"{len(points)} points, {len(names)} methods, {typed.rounds} rounds: about {duration(estimate)}")
    typed_command = command("adapters", args)
    about = {"command": typed_command, "machine": facts, "gemm_flops_per_second": rate}

    def work(keep: Callable[[list[Reading]], None]) -> list[Reading]:
        found: list[Reading] = []
        total = sum(ticks(len(methods_at(sweep, names)), typed.rounds) for sweep, _ in points)
        with measuring(total) as tick:
            for sweep, point in points:
                here = methods_at(sweep, names)
                made, missing = cases(point, here, device, typed.precision)
                measured = measure(made, gemm, typed.rounds, lambda _: tick(1)) + missing
                found.append(Reading(sweep, point, sorted(measured, key=lambda one: names.index(one.name))))
                keep(list(found))
        return found

    def note(results: list["Reading"], folder: Path) -> None:
        rows = [row for reading in results for row in reading.as_rows()]
        write_json(about | {"rows": rows}, folder / common.JSON)
        write_csv(rows, folder / "bench.csv")

    def finish(results: list["Reading"], folder: Path) -> None:
        note(results, folder)
        text, shown = [], []
        for sweep in dict.fromkeys(reading.sweep for reading in results):
            header, rows = sweep_cells(results, sweep)
            text.append(markdown(f"{what}, on {where}: {sweep}", header, rows, typed_command))
            shown.append(table(header, rows))
        remark = _NOTE.format(rounds=typed.rounds)
        write_text(folder / common.TABLE, "\n".join([*text, remark + "\n"]))
        write_figure(curves(f"{what}\non {where}", results), folder / common.PICTURE)
        print("\n" + "\n\n".join([*shown, remark]))

    common.in_folder(typed.output, "adapters", work, note, finish)
    return 0
