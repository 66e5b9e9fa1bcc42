"""``compare-methods``: every method on one few-shot data set, in one table."""

import argparse
import json
from pathlib import Path
from typing import NoReturn

from randlora_pl.cli.configs import find_config
from randlora_pl.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage."""
        raise UserError(f"{message}. See: randlora-pl compare-methods --help")


def compare_verb(args: list[str]) -> int:
    """``compare-methods [--config FILE] [--methods NAME ...] [--seeds N ...] [--tune] [--output FOLDER]``.

    Raises:
        UserError: An option, a method or the config is wrong.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="compare_methods")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output")
    typed = parser.parse_args(args)
    file = find_config(typed.config)
    from randlora_pl.cli.runs import new_folder  # light, but what follows imports PyTorch
    from randlora_pl.cli.train import quieten
    from randlora_pl.experiments.methods import Comparison, compare, tune

    comparison = Comparison.read(file).only(typed.methods)
    comparison.seeds = typed.seeds or comparison.seeds
    quieten()
    if typed.tune:
        found = tune(comparison)
        print(json.dumps(found, indent=1))
        return 0
    if typed.output and Path(typed.output).exists():
        raise UserError(f"{typed.output} exists; name a new folder, nothing is overwritten.")
    folder = Path(typed.output) if typed.output else new_folder(Path("runs"), "compare-methods")
    compare(comparison, folder)
    print(f"\n{(folder / 'table.md').read_text()}\n{folder / 'table.md'} and cells.json hold the figures")
    return 0
