"""One process of a cell on several devices: a sweep starts it with their folder and the modules of ``--import``."""

import json
import sys
import traceback
from pathlib import Path

from randlora_pl.commands.main import raise_on_sigterm
from randlora_pl.run.parallel.launch import parting, process_rank
from randlora_pl.sweep.loop import CELL, ERROR, Runner, end_with_parent
from randlora_pl.sweep.plan import Cell, Labels
from randlora_pl.utils.errors import LostProcessError, UserError
from randlora_pl.utils.files import read_mapping, write_text
from randlora_pl.utils.own_classes import import_named
from randlora_pl.utils.text import log_to_terminal


def main(folder: Path, modules: list[str]) -> int:
    """Run this process's part of a cell; return 1 after an error, which is written, and 143 after SIGTERM."""
    try:
        with raise_on_sigterm(), parting():
            end_with_parent()
            for module in modules:
                import_named(module)
            log_to_terminal()
            content = read_mapping(folder / CELL)
            facts = content["cell"] | {"labels": Labels(*content["cell"]["labels"])}
            Runner(content["test"])(Cell(**facts), Path(content["place"]))
    except KeyboardInterrupt:
        return 143
    except Exception as error:  # whatever a cell dies of, the sweep goes on
        known = isinstance(error, UserError | LostProcessError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        reason = f"process {process_rank()}: {reason}" if process_rank() else reason
        entry = {"mistake": isinstance(error, UserError), "reason": reason, "traceback": traceback.format_exc()}
        if not (folder / ERROR).exists():  # later errors are about the process that is gone
            write_text(folder / ERROR, json.dumps(entry))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
