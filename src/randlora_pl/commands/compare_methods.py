"""``compare-methods``: a sweep of all methods."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from randlora_pl.commands.sweep import run_sweep
from randlora_pl.commands.sweep_job import SweepOptions
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Option, Words


def compare_methods(
    words: Words,
    *,
    config: Annotated[str, Option("SWEEP")] = "compare_methods",
    methods: Sequence[str] = (),
    options: SweepOptions,
) -> int:
    """Compare all methods on one few-shot dataset over several seeds.

    The command runs a sweep, then prints the mean and standard error of each method and of two classifiers of raw
    pixels, also to DIR/table.md. Run the same command again to resume after Ctrl-C.

    Examples:
        randlora-pl compare-methods                                 16 shots of the digits, 3 seeds
        randlora-pl compare-methods --methods RandLoRA-6 --seeds 4 5

    Args:
        config: Sweep to run: a bundled one or a file
        methods: Run only these methods
    """
    if methods:
        options = replace(options, only=[*options.only, f"method={','.join(methods)}"])
    code, job = run_sweep(config, options, words.command("compare-methods"))
    if job is None or not any(map(job.folder.results, job.chosen)):
        return code
    from randlora_pl.lab.baselines import method_tables
    from randlora_pl.lab.report.collect import read_sweep

    text = method_tables(read_sweep(job.folder.path), job.chosen)
    write_text(job.folder.path / "table.md", text)
    print(f"\n{text}\nAlso in {job.folder.path / 'table.md'}")
    return code
