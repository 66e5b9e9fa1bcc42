"""Change one text of the source at a time, as a bad edit might, and see that the named test fails.

Usage: python scripts/mutations.py [WORD ...]

``tests/mutations.toml`` has the list; without words all of it runs. A number selects the mutation at that place, any
other word those that have it in their file, their test or what they break. The source is changed in a copy.
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "mutations.toml"
LIBRARIES = ("torch", "torchvision", "lightning.pytorch", "torchmetrics.classification", "timm", "open_clip")
"""Imported once: the process of each test begins with them."""
SECONDS = 300
"""Most for a test."""
RESULTS = {0: "survived", 1: "caught", None: "did not end"}
"""Meaning of pytest's exit code; with any other the test did not run."""


@dataclass(frozen=True)
class Mutation:
    """One change: what it breaks, the text (once in the file) and its replacement, and the test that fails."""

    breaks: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, copy: Path) -> None:
        """Change the file in a copy of the source."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            sys.exit(f"{self.file} has the text {self.old!r} {text.count(self.old)} times, not once.")
        (copy / self.file).write_text(text.replace(self.old, self.new), encoding="utf-8")

    def meant(self, word: str) -> bool:
        """Return True if a word selects it."""
        return any(word in text for text in (self.breaks, self.file, self.test))


def mutations(words: Sequence[str]) -> dict[int, Mutation]:
    """Return the mutations that the words select, by their places from 1; all without words."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutation"]
    every = dict(enumerate((Mutation(**entry) for entry in entries), 1))
    wanted = lambda place, one: any(word == str(place) or one.meant(word) for word in words)  # noqa: E731
    return {place: one for place, one in every.items() if not words or wanted(place, one)}


def run(test: str, copy: Path) -> int | None:
    """Run a test on a copy of the source in a new process; return pytest's exit code, None if it takes too long."""
    child = os.fork()
    if not child:
        os.setsid()  # what it starts ends with it
        os.environ["PYTHONPATH"] = str(copy / "src")
        sys.path.insert(0, str(copy / "src"))
        with (copy / "output.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        import pytest

        os._exit(pytest.main(["-n", "0", "-q", "-x", "-p", "no:cacheprovider", test]))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> int:
    """Run the selected mutations; return 1 unless all are caught."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    chosen, start, caught = mutations(parser.parse_args().words), time.monotonic(), 0
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # as tests/conftest.py, which is imported later
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "src", copy / "src")
        for place, one in chosen.items():
            begun = time.monotonic()
            one.apply(copy)
            code = run(one.test, copy)
            shutil.copy2(ROOT / one.file, copy / one.file)
            caught += code == 1
            result = RESULTS.get(code, f"pytest ended with {code}")
            print(f"{place:3}  {result}, {time.monotonic() - begun:.1f} s: {one.breaks}", flush=True)
    print(f"{caught} of {len(chosen)} caught in {time.monotonic() - start:.0f} s")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
