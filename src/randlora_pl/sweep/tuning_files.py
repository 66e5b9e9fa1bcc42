"""Files of a search of learning rates: the candidates, as a table and as JSON, and a config with the best."""

import json
from statistics import fmean

import yaml

from randlora_pl.sweep.description import SweepConfig, Tree
from randlora_pl.sweep.folder import PRUNED
from randlora_pl.sweep.provenance import FILE, shown
from randlora_pl.utils.errors import shortened
from randlora_pl.utils.text.tables import markdown_table


def markdown(report: Tree) -> str:
    """Return a table of candidates: validation accuracy in %, or loss, mean over datasets, budgets and models."""
    monitor = report["monitor"]
    loss = monitor.endswith("loss")
    what = monitor if loss else "Validation accuracy in percent" if monitor == "val/acc" else f"{monitor} in percent"

    def shown_as(value: float) -> str:
        return f"{value:.4f}" if loss else f"{100 * value:.1f}"

    where = " from the own rate of each method on" if report["sampler"] == "climb" else ""
    about = (
        f"{what}, the mean over models, datasets and budgets. Every candidate"
        f"{where} with seed {report['seeds'][0]}, the {report['finalists']} best of each method with all seeds; "
        "no test sample was read."
    )
    header = ["method", "tried", *(f"seed {seed}" for seed in report["seeds"]), "mean", ""]
    rows = []
    for method, facts in report["methods"].items():
        for entry in facts["tried"]:
            values = {key: value for key, value in entry.items() if key not in (monitor, "failed")}
            found = entry[monitor]
            cells = [shown_as(found[str(s)]) if str(s) in found else "" for s in report["seeds"]]
            mean = shown_as(fmean(found.values())) if found else ""
            reason = shortened(entry.get("failed", ""), 120)
            failed = f"failed: {reason}" if reason and not reason.startswith(PRUNED) else reason
            mark = "chosen" if values == facts["chosen"] else failed
            rows.append([method, shown(values), *cells, mean, mark])
    return "\n".join([about, "", *markdown_table(header, rows, (0, 1, len(header) - 1))]) + "\n"


def config_text(description: SweepConfig, head: str) -> str:
    """Return a description as a config: comments, then an entry a line; the provenance of its rates lies beside it."""
    lines = [head.rstrip("\n")] if head else []
    for key, value in (description.content() | {"tuned": FILE}).items():
        if key in ("models", "methods", "datasets") and isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {_flow({label: facts})[1:-1]}" for label, facts in value.items()]
        else:
            lines.append(_flow({key: value})[1:-1])
    return "\n".join(lines) + "\n"


def _flow(value: Tree) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()


def as_json(report: Tree) -> str:
    """Return the report as the text of ``tuning.json``."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"
