"""The README's terminal: runs the quickstart in a terminal of its own, and draws what it printed.

Usage, on an idle machine, from the checkout:

    python scripts/terminal_picture.py            runs it; writes docs/quickstart.txt and .svg, docs/measured.json
                                                  and the README's numbers
    python scripts/terminal_picture.py --draw     draws docs/quickstart.txt again
"""

import argparse
import io
import json
import os
import pty
import re
import shlex
import struct
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

from readme_pictures import DOCS, MEASURED, commit, write
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from randlora_pl.lab.bench import processor

COMMAND = "randlora-pl fit --config quickstart"
RECORD, PICTURE = DOCS / "quickstart.txt", DOCS / "quickstart.svg"
WIDTH = 94
KEPT = (
    *("RandLoRA", "model", "data", "trainable", "zero-shot", "Training", "test ", "parameters", "time", "peak"),
    *("Next:", "  randlora-pl predict", "  randlora-pl test --run"),
)
"""How the lines begin that the picture shows, from above; others of the record become one line with three dots."""
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)|\x1b")


def on_screen(output: str) -> list[str]:
    """The lines that are left on a terminal after all of a program's output, without colors."""
    rows, row, column = [""], 0, 0
    for number, code, move, words in _TOKEN.findall(output):
        count = int(number) if number.isdigit() else 1
        if move == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif move == "\r" or code == "G":
            column = 0
        elif code == "A":
            row = max(0, row - count)
        elif code == "K":
            rows[row] = "" if number == "2" else rows[row][:column]
        elif words:
            rows[row] = rows[row][:column].ljust(column) + words + rows[row][column + len(words) :]
            column += len(words)
    return [line.rstrip() for line in rows]


def recorded(words: list[str], home: Path) -> tuple[str, float]:
    """Run a program in a terminal of `WIDTH` columns; return its output and its seconds."""
    begin = time.perf_counter()
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(home)
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
        os.execvp(words[0], words)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    output = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the program has ended
            break
        if not part:
            break
        output += part
    assert os.waitpid(child, 0)[1] == 0, output.decode(errors="replace")
    return output.decode(errors="replace"), time.perf_counter() - begin


def run() -> None:
    """Run the quickstart; write what it printed, and its numbers."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        words = [sys.executable, "-m", "randlora_pl", *shlex.split(COMMAND)[1:]]
        output, seconds = recorded(words, home)
        results: dict[str, Any] = json.loads((home / "runs/quickstart/latest/results.json").read_text())
    RECORD.write_text("\n".join(on_screen(output)).strip("\n") + "\n", encoding="utf-8")
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    measured["quickstart"] = {
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "seconds": round(seconds),
        "training_seconds": round(results["fit_seconds"]),
        "zeroshot": round(100 * results["zeroshot/acc"], 1),
        "test": round(100 * results["test/acc"], 1),
        "trained": results["adapter_parameters"],
        "total": results["total_parameters"],
    }
    write(measured)


def picked(lines: list[str]) -> list[str]:
    """The lines that the picture shows."""
    found: list[str] = []
    for each in lines:
        if each.startswith(KEPT):
            found.append(each)
        elif each and found[-1:] != ["..."]:
            found.append("...")
    return found[:-1] if found[-1] == "..." else found


def picture(record: str) -> str:
    """The terminal as SVG, without a font from the network."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "green"), (COMMAND, "bold")))
    for each in picked(record.splitlines()):
        style = "bold" if each.startswith(("zero-shot", "test ")) else "bright_black" if each == "..." else ""
        for start in range(0, len(each), WIDTH):  # a terminal breaks long lines anywhere
            console.print(Text(each[start : start + WIDTH], style=style))
    console.print()  # the last line loses its descenders
    drawn = console.export_svg(title="randlora-pl", theme=SVG_EXPORT_THEME, unique_id="quickstart")
    drawn = re.sub(r"\s*@font-face \{.*?\}| https://www.textualize.io", "", drawn, flags=re.S)
    return drawn.replace("Fira Code", "ui-monospace")


def main() -> None:
    """Record, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        run()
    PICTURE.write_text(picture(RECORD.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
