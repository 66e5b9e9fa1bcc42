"""``compare-methods``: a sweep of every method on one few-shot dataset, and its table."""

import shlex

from randlora_pl.commands.common.arguments import CommandParser
from randlora_pl.commands.sweep.sweep import run_sweep
from randlora_pl.utils.files.atomic_output import write_text


def compare_methods_verb(args: list[str]) -> int:
    """Run ``compare-methods [--config SWEEP] [--methods NAME ...]`` with the options of ``sweep``."""
    parser = CommandParser("compare-methods")
    parser.add_options(config="compare_methods", methods=[str])
    typed, rest = parser.parse_known_args(args)
    chosen = ["--only", f"method={','.join(typed.methods)}"] if typed.methods else []
    same = f"randlora-pl compare-methods {shlex.join(args)}".rstrip()
    code, job = run_sweep([typed.config, *rest, *chosen], same, parser.verb)
    if job is None or not any(map(job.folder.results, job.chosen)):
        return code
    from randlora_pl.lab.methods import method_tables
    from randlora_pl.lab.report.collect import read_sweep

    text = method_tables(read_sweep(job.folder.path), job.chosen)
    write_text(job.folder.path / "table.md", text)
    print(f"\n{text}\nAlso in {job.folder.path / 'table.md'}")
    return code
