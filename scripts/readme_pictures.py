"""The README's pictures and numbers, from docs/measured.json and committed runs.

Usage, from the checkout; each step on its own:

    randlora-pl bench train --rounds 3 --methods full lora randlora randlora-low randlora-hadamard randlora-ternary \\
        peft-lora peft-randlora
    python scripts/readme_pictures.py --steps runs/bench-train/TIME/bench.json
    python scripts/readme_pictures.py          after docs/measured.json or what the picture shows was renewed

--steps takes numbers over into docs/measured.json, with the commit, and its table into docs/speed.md. The pictures
docs/hero*.svg show the output on docs/packed_attention.md and the runs in docs/results/evidence. Numbers in README
and pages are replaced.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from pandas import DataFrame, read_csv

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MEASURED, EVIDENCE = DOCS / "measured.json", DOCS / "results" / "evidence"
SHOWN = {
    "full fine-tuning": "Full fine-tuning",
    "HiRA": "HiRA",
    "LoRA": "LoRA",
    "DoRA": "DoRA",
    "RandLoRA-6": "RandLoRA",
}
"""Methods of the evidence on images, by name of the sweep."""

LIGHT = {"back": "#ffffff", "text": "#1f2328", "soft": "#59636e", "grid": "#d1d9e0", "edge": "#d1d9e0"}
LIGHT |= {"plain": "#0969da", "randlora": "#bc4c00", "right": "#1a7f37", "wrong": "#cf222e"}
DARK = {"back": "#0d1117", "text": "#e6edf3", "soft": "#9198a1", "grid": "#2a3038", "edge": "#3d444d"}
DARK |= {"plain": "#4493f8", "randlora": "#f0883e", "right": "#3fb950", "wrong": "#f85149"}


def commit() -> str:
    """The checkout's commit."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=DOCS, capture_output=True, text=True, check=True).stdout.strip()


def steps_of(bench: dict[str, Any]) -> dict[str, Any]:
    """The part `steps` of the measured numbers, from a bench.json: seconds and ratios as [least, median, greatest]."""

    def spread(ratio: dict[str, float] | None) -> list[float] | None:
        return ratio and [round(ratio[key], 2) for key in ("low", "median", "high")]

    machine = bench["machine"]
    return {
        "command": bench["command"],
        "commit": commit(),
        "machine": f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}",
        "methods": {
            case["name"]: {
                "label": case["label"],
                "trained": case["trained"],
                "seconds": [round(pick(case["seconds"]), 3) for pick in (min, median, max)],
                "of_full": spread(case["times_base"]),
                "of_peft": spread(case["times_peer"]),
                "saved_mb": round(case["saved"] / 1e6),
            }
            for case in bench["cases"]
        },
    }


def filled(page: str, sentence: str, *numbers: str) -> str:
    """Replace the numbers of one sentence of a page, where the sentence has ``#``."""
    parts = (r"\s+".join(map(re.escape, part.split(" "))) for part in sentence.split("#"))
    pattern = r"[\d.,]*\d".join(f"({part})" for part in parts)
    page, count = re.subn(
        pattern, lambda found: "".join(map("".join, zip_longest(found.groups(), numbers, fillvalue=""))), page
    )
    if count != 1:
        raise SystemExit(f"There are {count} sentences like {sentence!r}, not one.")
    return page


def sentences(measured: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """The sentences with measured numbers, by page: ``#`` for each number, then the numbers."""
    methods, quick = measured["steps"]["methods"], measured["quickstart"]
    spreads, ratios = [], {}
    for name in ("randlora", "randlora-hadamard", "lora"):
        least, ratios[name], most = (f"{number:.2f}" for number in methods[name]["of_peft"])
        spreads += [ratios[name], least, most]
    before, after = f"{quick['zeroshot']:.1f}", f"{quick['test']:.1f}"
    effect, off, _ = (f"{number:.2f}" for number in differences()["PEFT, attn"])
    return {
        "README.md": [
            ("the largest output error is #, where the whole update changes outputs by #", off, effect),
            (
                "takes # times as long as with PEFT's RandLoRA (range # to #), and # with hadamard bases (# to #)",
                *spreads[:6],
            ),
            ("in # s on two CPU cores", str(quick["seconds"])),
            ("# % of the digits are right before the training, # % after it", before, after),
            ("The # % is below chance", before),
        ],
        "docs/compared_with_peft.md": [
            ("| RandLoRA-6 | # |", ratios["randlora"]),
            ("against PEFT's dense bases | # |", ratios["randlora-hadamard"]),
            ("| LoRA-32 | # |", ratios["lora"]),
        ],
        "docs/choose.md": [
            ("# of the time of full fine-tuning, close to LoRA", f"{methods['randlora-hadamard']['of_full'][1]:.2f}"),
        ],
    }


def rewritten(measured: dict[str, Any]) -> dict[str, str]:
    """Pages with the measured numbers, by path in the checkout."""
    pages = {}
    for path, lines in sentences(measured).items():
        pages[path] = (ROOT / path).read_text(encoding="utf-8")
        for sentence, *numbers in lines:
            pages[path] = filled(pages[path], sentence, *numbers)
    return pages


def with_table(page: str, table: str) -> str:
    """A page whose first table of steps has the rows of another table; its header stays."""
    pattern = r"(^\| method \| trained \| ms .*\n\|[-:|]+\n)((?:\|.*\n)+)"
    (rows,) = [rows for _, rows in re.findall(pattern, table + "\n", flags=re.M)]
    page, count = re.subn(pattern, lambda found: found[1] + rows, page, count=1, flags=re.M)
    if not count:
        raise SystemExit("docs/speed.md has no table of steps.")
    return page


def write(measured: dict[str, Any]) -> None:
    """Write docs/measured.json, a list of numbers as one line."""
    content = json.dumps(measured, indent=1, ensure_ascii=False)
    content = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), content)
    MEASURED.write_text(content + "\n", encoding="utf-8")
    for path, page in rewritten(measured).items():
        (ROOT / path).write_text(page, encoding="utf-8")


def text(x: float, y: float, words: str, fill: str, size: int = 15, anchor: str = "start", bold: bool = False) -> str:
    """A line of text."""
    weight = ' font-weight="600"' if bold else ""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" fill="{fill}" font-size="{size}" text-anchor="{anchor}"{weight}>{words}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1) -> str:
    """A straight line."""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{stroke}" stroke-width="{width:g}" fill="none"/>'


def differences() -> dict[str, list[float]]:
    """Largest differences on packed attention, by line of the page's output; none for what stops with an error."""
    page = (DOCS / "packed_attention.md").read_text(encoding="utf-8")
    (output,) = re.findall(r"```text\n(difference to .*?)```", page, flags=re.S)
    lines = re.findall(r"^(\w+(?:, attn)?) ((?: +\d\.\d{3}){2,3})$", output, flags=re.M)
    stopped = re.findall(r"(?:compatible with|not support) (\w+)", output)
    seen = {f"PEFT, {name.lower()}": list[float]() for name in stopped}
    return seen | {name: [float(number) for number in numbers.split()] for name, numbers in lines}


def packed(ink: dict[str, str]) -> Iterable[str]:
    """The left panel: who computes W0 + dW on the attention of open_clip."""
    seen = differences()
    yield text(36, 50, "Exact on open_clip's packed attention", ink["text"], 22, bold=True)
    yield text(36, 78, "Largest output error, against a model with ΔW added to W0", ink["soft"])
    for x, words in ((190, "randlora-pl"), (370, "PEFT 0.21")):
        yield text(x, 124, words, ink["text"], 17, bold=True)
    yield line(36, 140, 566, 140, ink["grid"])
    for number, name in enumerate(("LoRA", "DoRA", "VeRA", "RandLoRA")):
        y = 178 + 52 * number
        yield text(36, y, name, ink["text"], 18)
        for x, case in ((190, name), (370, "PEFT, attn" if name == "LoRA" else f"PEFT, {name.lower()}")):
            words = f"{seen[case][1]:.3f}" if seen[case] else "stops with an error"
            mark, color = ("✓", "right") if words == "0.000" else ("✗", "wrong")
            yield text(x, y, f"{mark} {words}", ink[color], 18, bold=True)
    yield text(
        36, 390, "One block of open_clip's ViT. Run the script of docs/packed_attention.md to see it.", ink["soft"], 13
    )


def evidence() -> DataFrame:
    """Mean accuracy, its interval in %, trained parameters, and time relative to LoRA on one machine, by method."""
    means = read_csv(EVIDENCE / "summary.csv").query("dataset == '(average)'").set_index("method")
    runs = read_csv(EVIDENCE / "cells.csv").pivot(index=["dataset", "seed", "machine"], columns="method")["fit_seconds"]
    means["time"] = runs.div(runs["LoRA"], axis=0).median()
    return means.loc[[*SHOWN], ["mean", "ci95", "trainable_parameters", "time"]]


def methods(ink: dict[str, str]) -> Iterable[str]:
    """The right panel: accuracy, size and time of five methods."""
    left, right, low, high = 770, 950, 68.0, 71.5
    yield text(640, 50, "22 methods, compared fairly", ink["text"], 22, bold=True)
    yield text(640, 78, "Five of them: mean of 8 image datasets, 95 % interval of 5 seeds", ink["soft"])
    for x, words in ((left, "accuracy, %"), (1005, "trained"), (1110, "time")):
        yield text(x, 124, words, ink["text"], 17, bold=True)
    yield line(640, 140, 1164, 140, ink["grid"])
    for number, (name, mean, interval, trained, time) in enumerate(evidence().itertuples()):
        y = 174 + 43 * number
        least, middle, most = (
            left + (right - left) * (x - low) / (high - low) for x in (mean - interval, mean, mean + interval)
        )
        color = ink["randlora" if name.startswith("RandLoRA") else "plain"]
        yield text(640, y, SHOWN[name], ink["text"], 17)
        yield line(least, y - 6, most, y - 6, color, 3)
        yield f'<circle cx="{middle:.1f}" cy="{y - 6}" r="6" fill="{color}"/>'
        yield text(middle, y - 17, f"{mean:.1f}", ink["text"], 13, "middle")
        yield text(1005, y, f"{trained:,}", ink["text"], 16)
        yield text(1110, y, f"{time:.2f}".replace("nan", "–"), ink["text"], 16)
    yield text(
        640,
        390,
        "Small CLIP, same learning-rate search; time on one CPU relative to LoRA (–: other machine)",
        ink["soft"],
        13,
    )


def hero(ink: dict[str, str], narrow: bool = False) -> str:
    """The picture on top of the README, with one panel below the other if it is narrow."""
    width, height = (604, 840) if narrow else (1200, 420)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" '
        'font-family="-apple-system, BlinkMacSystemFont, Segoe UI, Noto Sans, Helvetica, Arial, sans-serif">',
        "<title>Exactness on packed attention; accuracy, size and time of five methods</title>",
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10" '
        f'fill="{ink["back"]}" stroke="{ink["edge"]}"/>',
        *packed(ink),
        line(36, 420, 566, 420, ink["grid"]) if narrow else line(604, 28, 604, 392, ink["grid"]),
        '<g transform="translate(-604 420)">' if narrow else "<g>",
        *methods(ink),
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"


def pictures() -> dict[str, str]:
    """The pictures by name in docs/."""
    inks, shapes = {"": LIGHT, "-dark": DARK}, {"": False, "-narrow": True}
    return {f"hero{shape}{ink}.svg": hero(inks[ink], shapes[shape]) for shape in shapes for ink in inks}


def main() -> None:
    """Take over new numbers, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path)
    typed = parser.parse_args()
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    if typed.steps:
        measured["steps"] = steps_of(json.loads(typed.steps.read_text(encoding="utf-8")))
        page, table = DOCS / "speed.md", typed.steps.with_name("table.md").read_text(encoding="utf-8")
        page.write_text(with_table(page.read_text(encoding="utf-8"), table), encoding="utf-8")
    write(measured)
    for name, picture in pictures().items():
        (DOCS / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
