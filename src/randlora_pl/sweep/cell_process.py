"""One process of a cell on several devices, which a sweep starts with their folder."""

import json
import sys
from pathlib import Path

from randlora_pl.sweep.loop import CELL, ERROR, Runner, end_with_parent, failure_of
from randlora_pl.sweep.plan import Cell, Labels
from randlora_pl.utils.files import read_mapping, write_text
from randlora_pl.utils.own_classes import import_named
from randlora_pl.utils.text import log_to_terminal


def main(folder: Path) -> int:
    """Run this process's part of a cell; return 1 after an error, which is written, and 143 after SIGTERM."""
    try:
        end_with_parent()
        task = read_mapping(folder / CELL)
        for module in task["modules"]:
            import_named(module)
        log_to_terminal()
        cell = Cell(**task["cell"] | {"labels": Labels(*task["cell"]["labels"])})
        Runner(task["test"]).run(cell, Path(task["place"]))
    except KeyboardInterrupt:
        return 143
    except Exception as error:  # whatever a cell dies of, the sweep goes on
        if not (folder / ERROR).exists():  # later errors are about the process that is gone
            write_text(folder / ERROR, json.dumps(failure_of(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
