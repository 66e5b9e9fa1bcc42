"""``compare-methods``: every method on one few-shot data set, in one table."""

from dataclasses import replace

from randlora_pl.cli.common.arguments import Parser
from randlora_pl.config.compose import read_config
from randlora_pl.config.shipped import find_config
from randlora_pl.engine.run_folder import output_folder
from randlora_pl.utils.errors import Terminated, UserError


def compare_verb(args: list[str]) -> int:
    """``compare-methods [--config FILE] [--methods NAME ...] [--seeds N ...] [--tune] [--output FOLDER]``.

    Raises:
        UserError: An option, a method or the config is wrong.
    """
    parser = Parser("compare-methods")
    parser.add_argument("--config", default="compare_methods")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output")
    typed = parser.parse_args(args)
    if typed.tune and typed.seeds:
        raise UserError("--tune takes the seeds of its own, tuning_seeds: leave out --seeds.")
    file = find_config(typed.config)
    from randlora_pl.utils.text.console import log_to_terminal
    from randlora_pl.utils.text.log_filters import silence_library_warnings

    silence_library_warnings()
    log_to_terminal()
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from randlora_pl.experiments.comparison import Comparison
    from randlora_pl.experiments.methods import best_rates, check_tuning, compare, tune

    comparison = Comparison.of(read_config(file), file).only(typed.methods)
    if typed.seeds:
        comparison = replace(comparison, seeds=typed.seeds)
    comparison.check()
    if typed.tune:
        check_tuning(comparison)
    folder = output_folder(typed.output, "compare-methods")
    try:
        if typed.tune:
            print(f"\nThe best rates, to be put below methods:\n{best_rates(comparison, tune(comparison, folder))}")
            print(f"and how they were chosen, to be put beside methods:\ntuned: {(folder / 'tuning.json').resolve()}")
            following = f"config cp {typed.config} my.yaml, then compare-methods --config my.yaml"
        else:
            compare(comparison, folder)
            print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}")
            following = f"compare-methods --config {typed.config} --tune"
    except (KeyboardInterrupt, SystemExit) as stop:  # the latter: Lightning's answer to Ctrl-C and SIGTERM
        ended = any(isinstance(one, SIGTERMException | Terminated) for one in (stop, stop.__context__))
        raise (Terminated if ended else KeyboardInterrupt)(f"what was finished is in {folder}") from stop
    print(f"\nFigures: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    print(f"Next: randlora-pl {following}")
    return 0
