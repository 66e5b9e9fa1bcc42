"""Commands that read finished runs: ``compare``, side by side, and ``report``, a sweep as tables and plots."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from randlora_pl.commands.common import print_json
from randlora_pl.run.options.compose import flatten, normalize
from randlora_pl.run.options.saved_config import check_run
from randlora_pl.run.run_folder import is_stamp
from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.files import parse_yaml, read_mapping
from randlora_pl.utils.options import Folder, Json, Option, Overwrite, Runs, is_number
from randlora_pl.utils.run_files import CONFIG
from randlora_pl.utils.text import table

FIRST = (
    *("test/loss", "steps", "learning_rate"),
    *("trainable_parameters", "adapter_parameters", "total_parameters", "adapter_bytes", "checkpoint_bytes"),
    *("fit_seconds", "images_per_second", "peak_memory_bytes", "device", "precision", "version", "git_commit"),
)
"""Results that are shown even if they are equal, in this order, after the metrics that count."""

_OPTIONS = (
    *("model", "model.name", "model.pretrained", "model.adapter", "model.prompts", "data.dataset", "data.shots"),
    "seed_everything",
)
"""Options to print if all runs agree."""


def compare(runs: Runs = (), *, json: Json = False) -> int:
    """Compare runs: what differs in their configs, and their results, parameters, time and memory.

    Examples:
        randlora-pl compare runs/lora runs/randlora
        randlora-pl compare runs/sweeps/NAME/cells/* --json

    Args:
        runs: Folders of runs, or runs/NAME for its newest run. Damaged or unfinished ones are marked and shown
            partially
        json: Print all options and metrics as JSON
    """
    if len(runs) < 2:
        raise UserError("compare: give two runs, such as runs/lora runs/randlora. See: randlora-pl compare --help")
    same = [folder for n, folder in enumerate(runs) if folder.resolve() in {f.resolve() for f in runs[:n]}]
    if same:
        raise UserError(f"compare: {same[0]} is given twice.")
    problems: list[str] = []
    names = _short_names(runs)
    configs = [_config(folder, problems) for folder in runs]
    results = [_results(folder, problems) for folder in runs]
    if json:
        listed = [
            {"run": str(folder), "finished": metrics.get("finished") is True, "config": config, "results": metrics}
            for folder, config, metrics in zip(runs, configs, results, strict=True)
        ]
        return print_json({"runs": listed, "problems": problems})
    for problem in problems:
        print(f"randlora-pl: warning: {problem}", file=sys.stderr)
    print("\n".join([*_shown_configs(names, configs), "", *_shown_results(names, results)]))
    return 0


def _config(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Return the options of a run by short names; empty if its config cannot be read."""
    import yaml

    if not (folder / CONFIG).is_file():
        if not (folder / "results.json").is_file():
            check_run(folder)
        problems.append(f"{folder} has no {CONFIG}")
        return {}
    try:
        check_run(folder)
    except UserError as error:
        problems.append(str(error))
    try:
        content = parse_yaml((folder / CONFIG).read_text(encoding="utf-8"))
        return flatten(normalize(content)) if content else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, UserError, TypeError, AttributeError) as error:
        problems.append(f"{folder / CONFIG} cannot be read ({first_line(error)}); its options are not shown")
        return {}


def _results(folder: Path, problems: list[str]) -> dict[str, Any]:
    file = folder / "results.json"
    try:
        metrics = read_mapping(file)
    except FileNotFoundError:
        problems.append(f"{folder} has no results yet")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{file} is cut off or damaged ({error}); its results are not shown")
        return {}
    if metrics.get("finished") is not True:
        problems.append(f"{folder} is not finished. Resume: randlora-pl fit --resume {folder}")
    return metrics


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the runs; more parts of the paths, as many as make them unique, if two runs share a name."""
    parts = [folder.resolve().parts for folder in folders]
    if len(own := dict.fromkeys(part[-2] for part in parts if is_stamp(part[-1]))) == len(folders):
        return list(own)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _shown_configs(names: Sequence[str], configs: Sequence[dict[str, Any]]) -> list[str]:
    known = [config for config in configs if config]
    keys = list(dict.fromkeys(key for config in known for key in config))
    differ = [key for key in keys if len({_text(config.get(key, "")) for config in known}) > 1]
    rows = [[key, *(_text(config.get(key, "")) if config else "?" for config in configs)] for key in differ]
    lines = [table(["option", *names], rows)] if rows else ["No option differs."]
    same = len(keys) - len(differ)
    shared = ", ".join(
        f"{key} {_text(known[0][key])}" for key in _OPTIONS if known and key in known[0] and key not in differ
    )
    return [*lines, f"Equal in all runs: {same} options{f', among them {shared}' if shared else ''}."]


def _shown_results(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[str]:
    """Return accuracy in percent and the other metrics, with the difference of two runs."""
    keys = list(dict.fromkeys(key for metrics in results for key in metrics))
    counting = dict.fromkeys(str(metrics.get("data/metric") or metrics.get("metric", "acc")) for metrics in results)
    stages = ("test", "zeroshot", "val", "best/val")
    first = dict.fromkeys((*(f"{stage}/{name}" for name in counting for stage in stages), *FIRST))
    shown = [key for key in first if key in keys]
    above = ("adapter/", "base/", "data/", "version/")  # shown with the configs
    others = [key for key in keys if key not in shown and key != "seed" and not key.startswith(above)]
    others = [key for key in others if any(is_number(metrics.get(key)) for metrics in results)]
    shown += [key for key in others if len({_text(metrics.get(key, "")) for metrics in results}) > 1]
    pair = len(results) == 2
    rows = []
    for key in shown:
        values: list[Any] = [metrics.get(key) for metrics in results]
        title = f"{key}, %" if key.endswith("/acc") else key
        title = f"{key.removesuffix('_bytes')}, MB" if key.endswith("_bytes") else title
        row = [title, *(_formatted(key, value) for value in values)]
        if pair:  # the second minus the first
            change = values[1] - values[0] if all(map(is_number, values)) else None
            row.append(f"{'+' if change is not None and change > 0 else ''}{_formatted(key, change)}")
        rows.append(row)
    return [table(["result", *names, *["difference"] * pair], rows)] if rows else ["No results."]


def _formatted(key: str, value: Any) -> str:
    if not is_number(value):
        return "" if value is None else _text(value)[:10] if key == "git_commit" else _text(value)
    if key.endswith("/acc"):
        return f"{100 * value:.2f}"
    if key.endswith("_bytes"):
        return f"{value / 1e6:,.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _text(value: Any) -> str:
    if isinstance(value, str) and value.startswith("randlora_pl."):
        return value.rpartition(".")[2]  # a class, by its name
    return "null" if value is None else str(value)


def report(
    sweep: Annotated[Path, Option("SWEEP")], *, output: Folder | None = None, overwrite: Overwrite = False
) -> int:
    """Write tables and plots of a sweep as Markdown, CSV and one self-contained HTML page.

    Examples:
        randlora-pl report runs/sweeps/NAME
        randlora-pl report runs/sweeps/NAME --output docs/results/NAME --overwrite

    Args:
        sweep: Folder of a sweep, even one that is still running: cells without a result are marked. Or the folder of a
            report, which is regenerated from its cells.csv
        output: Folder to write (default: SWEEP/report)
        overwrite: Replace the report in that folder. Other files stay

    Note:
        The files:
          index.html   The conclusion, and the difference of each method to a reference method with its interval. Then
                       every cell with its mean and 95 % confidence interval over seeds, and averages over the datasets
                       that all compared methods have. The paper's values, if the sweep names a table. A verdict per
                       pair of methods with comparable rates, the rates, the costs, and how the report was made
          report.md    The same content for a repository
          cells.csv    Every run. summary.csv has every mean, and sweep.yaml the sweep
          figures/     Plots of differences, of accuracy against parameters, and of GPU memory, as PNG and SVG
    """
    from randlora_pl.lab.report import cells, collect, files
    from randlora_pl.sweep.folder import REPORT

    runs = collect.read_sweep(sweep)
    for line in runs.warnings:
        print(f"randlora-pl: warning: {line}", file=sys.stderr)
    written = files.write_report(runs, output or sweep / REPORT, overwrite)
    states = Counter(runs.cells["state"])
    others = "".join(f", {count} {state}" for state, count in states.items() if state != cells.FINISHED)
    print(f"{states[cells.FINISHED]} of {len(runs.cells)} runs are finished{others}")
    for file in written:
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"Next: open {written[0]} in a browser")
    return 0
