"""``tune``: learning rates (and alphas) of a sweep or a single run, chosen on validation images."""

import argparse
import copy
import shlex
from dataclasses import replace
from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser
from randlora_pl.commands.sweep.job import Job, check_typed, choose, find_sweep, parser_of, words_of
from randlora_pl.commands.sweep.run import dry_run
from randlora_pl.commands.sweep.tuning import Tuning, comments, search_of
from randlora_pl.run.options.classes import Tree, normalize
from randlora_pl.run.options.compose import DEFAULTS, Command, compose, merge, nested, parse_value
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.run.options.own_classes import import_classes
from randlora_pl.run.options.validate import is_text_task, rate_name
from randlora_pl.sweep.description import SweepConfig, budget
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.trial_config import check
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.text.console import silence_library_warnings

RATES = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0]
"""Candidate rates; the search begins at the method's own rate and goes towards better ones."""


def tune_verb(args: list[str]) -> int:
    """Search, and write the result.

    Returns:
        0, or 1 if a method has no candidate that worked.
    """
    if {"-c", "--config"} & {word.partition("=")[0] for word in args}:
        return tune_run(args)
    typed = parser_of("tune").parse_args(args)
    check_typed(typed)
    file, description = find_sweep(typed.config)
    for word in typed.only:
        if word.partition("=")[0] not in ("model", "dataset", "method"):
            raise UserError(f"--only {word}: a search is restricted by model, dataset or method.")
    path = Path("runs") / "tune" / file.stem if typed.output is None else typed.output
    found = search_of(typed, file, description, path, f"randlora-pl tune {shlex.join(args)}{import_words()}")
    if typed.dry_run:
        return dry_run(found.job)
    tuned = found.run(typed, words_of("tune", args, found.job), comments(file))
    if found.stopped:
        return 0
    print(f"Next: randlora-pl sweep {shlex.quote(str(tuned))}")
    return 1 if found.without() else 0


def tune_run(args: list[str]) -> int:
    """Search the learning rate of a run, and print the command that starts the run with it.

    Returns:
        0, or 1 if no rate worked.
    """
    parser = CommandParser("tune")
    parser.add_options(output=Path, dry_run=False, retry_failed=False, max_hours=float, jobs=1)
    typed, words = parser.parse_known_args(args)
    check_typed(typed)
    command = compose("fit", words, copy.deepcopy(DEFAULTS))
    if command.folders:
        raise UserError("tune does not need --resume: it finds finished candidates itself.")
    import_classes(command)
    check_names(command)
    silence_library_warnings()
    tree = tree_of(command)
    description = described(tree, command.named)
    path = typed.output or Path("runs") / "tune" / Path(command.named[-1]).stem
    found = _search(typed, tree, description, path, f"randlora-pl tune {shlex.join(args)}{import_words()}")
    if typed.dry_run:
        return dry_run(found.job)
    found.run(typed, words_of("tune", args, found.job), None)
    if found.stopped:
        return 0
    if found.without():
        return 1
    ((method, chosen),) = found.search.chosen(found.job.folder).items()
    ((name, rate),) = chosen.items()
    print(f"Best {name} of {method}: {rate:g}")
    print(f"Next: randlora-pl fit {shlex.join(words)} --model.{name} {rate:g}")
    return 0


def tree_of(command: Command) -> Tree:
    """Return the config of a run with the typed options in it."""
    tree = command.config
    for name, text in command.values.items():
        tree = merge(tree, normalize(nested({name: parse_value(text)})))
    return tree


def described(tree: Tree, configs: list[str]) -> SweepConfig:
    """Return the search of a run as a sweep of one model, one method and one dataset.

    Args:
        tree: The run's config.
        configs: Names of the configs, for the record.
    """
    from randlora_pl.sweep.expand import data_of, task_of

    task = task_of(check(tree))
    if task is None:
        raise UserError("tune --config supports only tasks of this program. Write a sweep for another one.")
    method = task.adapter.method()
    kind = str(tree["model"]["class_path"]).rpartition(".")[2]
    name = rate_name(method, kind)
    data = dict(tree.get("data", {}))
    shots, fraction = data.pop("shots", None), data.pop("fraction", None)
    known = data_of(check(tree))  # of images or of texts
    dataset = str(known.row.name if hasattr(known, "row") else known.dataset)
    seed = int(tree.get("seed_everything") or 0)
    monitor = tree.get("checkpoint", {}).get("monitor")
    loss = is_text_task(kind)
    return SweepConfig.of({
        "models": {str(tree["model"]["init_args"].get("name", "model")): {"config": [Path(c).stem for c in configs]}},
        "methods": {method: {"adapter": method, name: float(getattr(task, name))}},
        "datasets": {dataset: data | {"dataset": dataset}},
        "budgets": [budget(shots) if shots else budget(float(fraction)) if fraction else "100%"],
        "seeds": [seed],
        "tune": {
            "learning_rates": RATES,
            "climb": True,
            "seeds": [other for other in range(3) if other != seed][:2],
            "monitor": monitor or ("val/loss" if loss else "val/acc"),
        },
    })  # fmt: skip


def _search(typed: argparse.Namespace, tree: Tree, description: SweepConfig, path: Path, same: str) -> Tuning:
    from randlora_pl.sweep.tuning import Search

    (name,) = description.models  # each candidate is the config of the run, with another rate
    search = Search.of(replace(description, models={name: {"config": tree}}))
    folder = SweepFolder(path, "tune.yaml")
    job = Job(description, search.all_cells(), search.first(folder), folder, same)
    choose(job, [], None, False, typed.dry_run)
    job.folder.check(job.cells)
    return Tuning(job, search)
