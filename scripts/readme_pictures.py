"""The README's pictures and numbers, from docs/measured.json.

Usage, from the checkout; each step on its own:

    randlora-pl bench train --rounds 3 --methods full lora randlora randlora-low randlora-hadamard randlora-ternary \\
        peft-lora peft-randlora
    python scripts/readme_pictures.py --steps runs/bench-train/TIME/bench.json
    randlora-pl analyze spectrum runs/lora runs/randlora runs/full --output spectrum      (the runs of docs/analyses.md)
    python scripts/readme_pictures.py --spectrum spectrum/spectrum.json
    python scripts/readme_pictures.py          after docs/measured.json was edited

The options take numbers over into docs/measured.json, with the commit, and --steps its table into docs/speed.md. Then
docs/hero.svg and docs/hero-dark.svg are drawn, and the numbers in the sentences of README and pages are replaced.
"""

import argparse
import json
import math
import re
import subprocess
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MEASURED = DOCS / "measured.json"
SHOWN = {
    "peft-randlora": "PEFT RandLoRA",
    "randlora": "RandLoRA",
    "lora": "LoRA",
    "randlora-hadamard": "RandLoRA, hadamard",
}
"""Methods of the bars, from above."""
POINTS = 60
"""Points of a curve of singular values."""
SMALLEST = 1e-7
"""Below it a relative singular value is rounding of float32."""

LIGHT = {"back": "#ffffff", "text": "#1f2328", "soft": "#59636e", "grid": "#d1d9e0", "edge": "#d1d9e0"}
LIGHT |= {"full": "#59636e", "lora": "#0969da", "randlora": "#bc4c00", "peft": "#8c959f"}
DARK = {"back": "#0d1117", "text": "#e6edf3", "soft": "#9198a1", "grid": "#2a3038", "edge": "#3d444d"}
DARK |= {"full": "#9198a1", "lora": "#4493f8", "randlora": "#f0883e", "peft": "#656c76"}


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


def spectrum_of(adapters: list[dict[str, Any]]) -> dict[str, Any]:
    """The part `spectrum`: rank of the update, and medians over layers of the relative singular values."""
    found = {}
    shared = set.intersection(*({layer["layer"] for layer in one["layers"]} for one in adapters))
    for one in adapters:
        rows = [layer["singular_values"] for layer in one["layers"] if layer["layer"] in shared]
        columns = zip(*map(relative, rows), strict=True)
        found[one["adapter"]] = {
            "parameters": one["parameters"],
            "rank": round(one["mean"]["rank"], 1),
            "full_rank": round(one["mean"]["full_rank"], 1),
            "singular_values": [float(f"{median(column):.3g}") for column in columns],
        }
    return {"commit": commit(), "adapters": found}


def relative(values: list[float]) -> list[float]:
    """Singular values relative to the largest, at `POINTS` places from the first to the last."""
    found = []
    for point in range(POINTS):
        place = point / (POINTS - 1) * (len(values) - 1)
        low = min(math.floor(place), len(values) - 2)
        between = values[low] + (place - low) * (values[low + 1] - values[low])
        found.append(max(between / values[0], SMALLEST))
    return found


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
    methods, quick, adapters = measured["steps"]["methods"], measured["quickstart"], measured["spectrum"]["adapters"]
    spreads, ratios = [], {}
    for name in ("randlora", "randlora-hadamard", "lora"):
        least, ratios[name], most = (f"{number:.2f}" for number in methods[name]["of_peft"])
        spreads += [ratios[name], f"{least}..{most}"]
    times = [f"{methods[name]['seconds'][1]:.1f}" for name in ("lora", "randlora-hadamard")]
    before, after = f"{quick['zeroshot']:.1f}", f"{quick['test']:.1f}"
    by_name = {name.partition(" ")[0]: one for name, one in adapters.items()}
    ours, theirs = by_name["RandLoRA"], by_name["LoRA"]
    rank, full, other = (f"{number:.0f}" for number in (ours["rank"], ours["full_rank"], theirs["rank"]))
    return {
        "README.md": [
            ("takes # (#) of the time of PEFT's RandLoRA, and # (#) with hadamard bases", *spreads[:4]),
            ("LoRA takes # s, hadamard # s", *times),
            ("# s on two CPU cores", str(quick["seconds"])),
            ("# % of the digits are right before the training, # % after it", before, after),
            ("The # % is below chance", before),
            ("update has rank #, RandLoRA's has rank # of # with as many parameters", other, rank, full),
            ("The update has rank # of # with # parameters", rank, full, f"{ours['parameters']:,}"),
            ("LoRA with # has rank #", f"{theirs['parameters']:,}", other),
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


def curves(spectrum: dict[str, Any], ink: dict[str, str]) -> Iterable[str]:
    """The left panel: singular values of the updates, on a logarithmic axis."""
    left, right, top, bottom = 92, 560, 104, 340
    by_name = {name.partition(" ")[0]: one for name, one in spectrum["adapters"].items()}
    lora, randlora, full = (by_name[name] for name in ("LoRA", "RandLoRA", "FullFineTuning"))
    yield text(36, 46, "Full rank with LoRA's number of parameters", ink["text"], 22, bold=True)
    yield text(36, 72, "Singular values of the update, relative to the largest", ink["soft"])
    for power in range(0, -8, -1):
        y = top + (bottom - top) * power / -7
        if power % 2 == 0:
            yield line(left, y, right, y, ink["grid"])
            yield text(left - 10, y + 5, "1" if power == 0 else f"1e{power}", ink["soft"], 13, "end")
    for one, color, width in ((full, "full", 2.5), (lora, "lora", 3.5), (randlora, "randlora", 3.5)):
        values = one["singular_values"]
        points = [
            f"{left + (right - left) * n / (len(values) - 1):.1f} {top + (bottom - top) * math.log10(value) / -7:.1f}"
            for n, value in enumerate(values)
        ]
        dash = ' stroke-dasharray="7 5"' if color == "full" else ""
        yield f'<path d="M{"L".join(points)}" fill="none" stroke="{ink[color]}" stroke-width="{width}"{dash}/>'
    yield text(right - 4, top + 20, f"full fine-tuning, {full['parameters']:,} parameters", ink["full"], 15, "end")
    words = (
        f"RandLoRA, {randlora['parameters']:,} parameters: rank {randlora['rank']:.0f} of {randlora['full_rank']:.0f}"
    )
    yield text(left + 60, top + 112, words, ink["randlora"], 16, bold=True)
    words = f"LoRA, {lora['parameters']:,} parameters: rank {lora['rank']:.0f}"
    yield text(left + 60, bottom - 16, words, ink["lora"], 16, bold=True)
    yield text((left + right) / 2, bottom + 26, "index of the singular value / full rank", ink["soft"], 13, "middle")
    yield text(36, 402, "Tiny CLIP on digits, median over 30 layers", ink["soft"], 13)


def bars(steps: dict[str, Any], ink: dict[str, str]) -> Iterable[str]:
    """The right panel: seconds of a training step, with the least and the greatest."""
    left, right, top = 800, 1000, 108
    shown = {name: steps["methods"][name] for name in SHOWN}
    longest = max(one["seconds"][2] for one in shown.values())
    yield text(640, 46, "A faster training step than PEFT's RandLoRA", ink["text"], 22, bold=True)
    yield text(640, 72, "Seconds per step of ViT-B/32 with 64 images", ink["soft"])
    for number, (name, one) in enumerate(shown.items()):
        y = top + 60 * number
        color = ink["peft" if name.startswith("peft") else "randlora" if "rand" in name else "lora"]
        least, middle, most = (left + (right - left) * value / longest for value in one["seconds"])
        yield f'<rect x="{left}" y="{y}" width="{middle - left:.1f}" height="34" rx="3" fill="{color}"/>'
        yield line(least, y + 17, most, y + 17, ink["text"], 1.5)
        yield from (line(x, y + 11, x, y + 23, ink["text"], 1.5) for x in (least, most))
        yield text(left - 12, y + 23, SHOWN[name], ink["text"], 16, "end")
        ratio = one["of_peft"] if "rand" in name else None
        words = f"{one['seconds'][1]:.1f} s" + (f", {ratio[1]:.2f} of PEFT's" if ratio else "")
        yield text(most + 10, y + 23, words, ink["text"], 16, bold=bool(ratio))
    yield text(640, 402, f"{steps['machine']}, commit {steps['commit']}; no GPU was measured", ink["soft"], 13)


def hero(measured: dict[str, Any], ink: dict[str, str]) -> str:
    """The picture on top of the README."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1200 420" width="1200" height="420" role="img" '
        'font-family="-apple-system, BlinkMacSystemFont, Segoe UI, Noto Sans, Helvetica, Arial, sans-serif">',
        "<title>Rank of the update, and seconds of a training step</title>",
        f'<rect x="1" y="1" width="1198" height="418" rx="10" fill="{ink["back"]}" stroke="{ink["edge"]}"/>',
        *curves(measured["spectrum"], ink),
        line(604, 28, 604, 392, ink["grid"]),
        *bars(measured["steps"], ink),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Take over new numbers, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path)
    parser.add_argument("--spectrum", type=Path)
    typed = parser.parse_args()
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    for name, file, reduce in (("steps", typed.steps, steps_of), ("spectrum", typed.spectrum, spectrum_of)):
        if file:
            measured[name] = reduce(json.loads(file.read_text(encoding="utf-8")))
    if missing := sorted(set(SHOWN) - set(measured["steps"]["methods"])):
        raise SystemExit(f"{typed.steps} has no {', '.join(missing)}; nothing was written.")
    if typed.steps:
        page, table = DOCS / "speed.md", typed.steps.with_name("table.md").read_text(encoding="utf-8")
        page.write_text(with_table(page.read_text(encoding="utf-8"), table), encoding="utf-8")
    write(measured)
    for name, ink in (("hero.svg", LIGHT), ("hero-dark.svg", DARK)):
        (DOCS / name).write_text(hero(measured, ink), encoding="utf-8")


if __name__ == "__main__":
    main()
