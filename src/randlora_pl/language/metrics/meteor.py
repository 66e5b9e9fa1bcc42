"""METEOR 1.5 (Denkowski and Lavie, 2014) through its own program, which pycocoevalcap brings along.

The program holds its word lists, synonyms and paraphrases, so nothing is downloaded; it needs Java. nltk's METEOR is an
older definition with other weights and wants WordNet's files: its scores cannot be put beside published ones.
pycocoevalcap's own caller waits for ever where the program ends early, so it is called from here.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from randlora_pl.language.metrics.ptb_tokens import words

OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")
"""Sentences come through a pipe, are English and are normalized, as in COCO's evaluation."""


def meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float | None, str]:
    """Compute METEOR of the corpus in 0..1, as COCO's evaluation calls it (all four kinds of matches).

    Returns:
        The score and an empty text, or None and the reason with what to do.
    """
    if shutil.which("java") is None:
        return None, "METEOR needs Java: install a Java runtime, such as the package default-jre-headless"
    program = _program()
    if program is None:
        return None, 'METEOR needs the program in pycocoevalcap: pip install ".[e2e]" in the checkout'
    try:
        return _score(program, texts, references), ""
    except (OSError, ValueError) as error:  # the pipe breaks, or an answer is not a number
        return None, f"METEOR's program failed ({error}): check `java -version` (METEOR needs 2 GB of memory)"


def _program() -> Path | None:
    """Return the program in the package, which is not imported: that would load more than is needed."""
    package = importlib.util.find_spec("pycocoevalcap")
    for folder in package.submodule_search_locations or () if package else ():
        found = Path(folder) / "meteor" / "meteor-1.5.jar"
        if found.is_file():
            return found
    return None


def _score(program: Path, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the score of the corpus.

    Each ``SCORE`` line is answered by the counts of one text; ``EVAL`` with all of them by a line for each text and
    one for the corpus. The program may end early (OSError), or an answer may not be a number (ValueError).
    """
    command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(program), *OPTIONS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
    ) as running:
        try:
            counts = [
                _answer(running, " ||| ".join(["SCORE", *map(_line, group), _line(text)]))
                for text, group in zip(texts, references, strict=True)
            ]
            _answer(running, " ||| ".join(["EVAL", *counts]))
            for _ in texts[1:]:
                _answer(running)
            return float(_answer(running))
        finally:
            running.kill()


def _line(text: str) -> str:
    """Return the words of a sentence; bars would separate, and an empty line would not be a sentence."""
    return " ".join(words(text)).replace("|", " ").strip() or "."


def _answer(running: "subprocess.Popen[str]", line: str = "") -> str:
    """Return the program's answer to a line, or without one its next line."""
    assert running.stdin is not None and running.stdout is not None
    if line:
        running.stdin.write(f"{line}\n")
        running.stdin.flush()
    if not (answer := running.stdout.readline()):
        raise OSError("it ended early")
    return answer.strip()
