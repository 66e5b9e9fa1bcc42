"""``sweep``: all cells of a grid. ``tune``: a search of their options."""

import argparse
import io
import json
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import yaml

from randlora_pl.commands import sweep_job as jobs
from randlora_pl.commands.common import Command
from randlora_pl.commands.sweep_job import CellOptions, Job, LimitedOptions, SweepOptions
from randlora_pl.language.catalog import OWN_TEXTS
from randlora_pl.run.options.classes import rate_name
from randlora_pl.run.options.compose import DEFAULTS, compose, merge, nested, normalize, parse_value
from randlora_pl.run.options.compose import Command as FitCommand
from randlora_pl.run.options.mistakes import check_names, choose_dataset
from randlora_pl.run.options.saved_config import import_classes
from randlora_pl.sweep import FILE, LOWEST, RATES, Seeds, SweepConfig, Tree, Tune, budget, fit, is_zero_shot, shown
from randlora_pl.sweep.folder import PRUNED, REPORT, TUNE, SweepFolder
from randlora_pl.sweep.margins import BREAKS, NAMES, next_higher, rule_text
from randlora_pl.sweep.plan import check, is_text, labels_of, plan
from randlora_pl.utils.errors import UserError, errors_in, shorten
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Option, Rest, Words
from randlora_pl.utils.own_classes import path_of
from randlora_pl.utils.text import markdown_table

if TYPE_CHECKING:
    from randlora_pl.tasks import Measure


def sweep(config: Annotated[str, Option("CONFIG")], options: SweepOptions, words: Words) -> int:
    """Run a grid of models, datasets, budgets, methods and seeds.

    Each cell is a run folder. Finished cells are skipped, so you can run the same command again after a crash, Ctrl-C
    or a reboot. Several processes can share a sweep.

    Examples:
        randlora-pl sweep offline --dry-run
        randlora-pl sweep offline --jobs 2
        randlora-pl sweep mine.yaml --tune          search the learning rates first (randlora-pl tune --help)
        randlora-pl sweep table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
        randlora-pl sweep table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

    Args:
        config: Sweep to run: a bundled config (randlora-pl config list) or a file
    """
    typed, same = options, words.command("sweep")
    if typed.tune:
        tuned = _tune_first(config, typed, same)
        if tuned is None:
            return 0
        config, typed = tuned
    file, description = jobs.find_sweep(config)
    if typed.seeds is not None:
        fit(list(typed.seeds), Seeds, "--seeds")
        description = replace(description, seeds=list(typed.seeds))
    with errors_in(file):
        cells = plan(replace(description, root=typed.root))
        jobs.check_root_is_read(cells, typed.root)
    path = Path("runs") / "sweeps" / file.stem if typed.output is None else typed.output
    job = Job(description, cells, SweepFolder(path), typed, same)
    jobs.choose(job, typed.only, typed.shard)
    if typed.dry_run:
        return jobs.dry_run(job)
    config = os.path.realpath(config) if Path(config).is_file() else config
    child = ["sweep", config]  # by a path that is valid in any folder
    following = f"randlora-pl report {job.place}{' --overwrite' * (job.folder.path / REPORT).exists()}"
    if not jobs.run(job, child):
        return 0
    others = typed.jobs > 1 or job.outcome.elsewhere
    if description.baselines and not job.outcome.stopped and not others:  # after the last cell of all
        from randlora_pl.lab.baselines import measure

        measure(job.folder.path, job.chosen)
    return jobs.end(job, following)


@dataclass(kw_only=True)
class SearchOptions(LimitedOptions):
    """Options of a search.

    Attributes:
        search: Options to search: learning_rate, options of the adapter, or data.batch_size and the like, each with
            values (1,2,4) or a range (1..64) (default: the learning rates of adapter and head, by factors of two).
        sampler: climb from each method's own rates (default), grid for all values, or tpe for candidates that Optuna
            selects.
        trials: Candidates of each method (default: 20 with tpe, 8 with climb, 16 with two rates). By default climb adds
            more, for all methods, while the best rate of one is at the edge.
        pruner: With tpe, end worse runs early: median, or halving (default: none).
    """

    search: Annotated[Sequence[str], Option("NAME=VALUES")] = ()
    sampler: str | None = None
    trials: int | None = None
    pruner: str | None = None


@dataclass(kw_only=True)
class TuneOptions(CellOptions, SearchOptions):
    """Options of a search for the methods of a sweep."""


def tune(words: Words) -> int:
    """Search the learning rate, and any other option, of each method of a sweep on validation samples.

    Test samples are not read. A trained head has its own rate, which is searched alternately with the adapter's. All
    methods have equal numbers of candidates, each with one seed, and the best four run with all seeds. Of those within
    one standard error of the best, the lowest rates are chosen. Run the same command again to resume. It writes all
    results (tuning.md and .json) and a config with the chosen rates (tuned.yaml).

    Examples:
        randlora-pl tune offline --dry-run
        randlora-pl tune offline --jobs 2
        randlora-pl sweep runs/tune/offline/tuned.yaml         or both at once: randlora-pl sweep offline --tune
        randlora-pl tune --config quickstart --data.shots 16   the rate of a single run, with the options of fit
        randlora-pl tune -c quickstart --search learning_rate=1e-4..1e-1 rank=1..32 --sampler tpe --pruner median

    Args:
        config: Sweep to tune: a bundled config or a file

    Note:
        The config's section `tune` has the same, and what to search on:
          tune: {search: {learning_rate: [1e-3, 1e-2], rank: [4, 8]}, sampler: grid, seeds: [0, 4], datasets: [digits],
                 budgets: [16], monitor: val/acc, set: {...}}

        With climb, `rule: best` searches one rate of each method and chooses the best of two finalists.

        Without `monitor` the best val/acc is selected for images, and the lowest val/loss for texts (GLUE also has
        val/score). The seeds must differ from the sweep's. The defaults are the three lowest that it does not use, and
        all its datasets and budgets.
    """
    of_run = {"-c", "--config"} & {word.partition("=")[0] for word in words}
    command = Command("tune", _tune_run if of_run else _tune_sweep, tune.__doc__)
    if {"--help", "-h"} & set(words):
        print(Command("tune", _tune_sweep, tune.__doc__).page, end="")
        return 0
    return command.function(**command.arguments(words))


def parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a search for a sweep, as a shell completes it."""
    return Command(name, _tune_sweep).parser()


def _tune_sweep(config: Annotated[str, Option("CONFIG")], typed: TuneOptions, words: Words) -> int:
    """Search for the methods of a sweep, and write the result; return 1 if a method has no candidate that worked."""
    file, description = jobs.find_sweep(config)
    job = search_job(typed, file, description, words.command("tune"))
    if typed.dry_run:
        return jobs.dry_run(job)
    best = run_search(job, ["tune", str(file)], file)
    if job.outcome.stopped or not best:
        return 0
    print(f"Next: randlora-pl sweep {shlex.quote(str(job.folder.path / 'tuned.yaml'))}")
    return 1 if None in best.values() else 0


def _tune_first(config: str, typed: SweepOptions, same: str) -> tuple[str, SweepOptions] | None:
    """Return the config with the best values and the options that are left; None if the search is not finished."""
    options = {"--shard": typed.shard, "--seeds": typed.seeds, "--launcher slurm": typed.launcher == "slurm"}
    for option in filter(options.get, options):
        raise UserError(
            f"--tune cannot be combined with {option}. Search first: randlora-pl tune {shlex.quote(config)}"
        )
    start = time.monotonic()
    file, description = jobs.find_sweep(config)
    typed = replace(typed, output=typed.output or Path("runs") / "sweeps" / file.stem)
    assert typed.output is not None
    if any((typed.output / "cells").glob("*")) and not (typed.output / TUNE).is_dir():
        raise UserError(
            f"{typed.output} has cells that were run without a search. Use another folder for the tuned cells: "
            f"--tune --output {shlex.quote(str(typed.output))}-tuned"
        )
    kept = [word for word in typed.only if not word.startswith(("budget=", "seed="))]
    kept = [word for word in kept if not is_zero_shot(word.removeprefix("method="))]
    shared = {each.name: getattr(typed, each.name) for each in fields(CellOptions)}
    searched = TuneOptions(**shared | {"only": kept, "output": typed.output / TUNE})
    job = search_job(searched, file, description, same)
    tuned = job.folder.path / "tuned.yaml"
    if typed.dry_run:
        jobs.dry_run(job)
        print("\nThen, with the best values:\n")
        return str(tuned) if tuned.is_file() else config, typed
    run_search(job, [TUNE, str(file)], file)
    if typed.max_hours is not None:
        left = typed.max_hours - (time.monotonic() - start) / 3600
        typed = replace(typed, max_hours=max(1e-9, left))
    return None if job.outcome.stopped else (str(tuned), typed)


def config_of_run(others: list[str]) -> tuple[FitCommand, Tree]:
    """Return the typed options of a run as `fit` reads them, and its config with all of them in it.

    Raises:
        UserError: An option is wrong.
    """
    command = compose("fit", others, DEFAULTS)
    import_classes(command)
    choose_dataset(command)
    check_names(command)
    tree = command.config
    for name, text in command.values.items():
        tree = merge(tree, normalize(nested({name: parse_value(text)})))
    return command, tree


def _tune_run(words: Words, others: Rest, typed: SearchOptions) -> int:
    command, tree = config_of_run(others)
    if command.folders:
        raise UserError("tune does not need --resume: it finds finished candidates itself.")
    from randlora_pl.sweep.expand import data_of, task_of

    task = task_of(check(tree))
    method = task.adapter.method()
    kind = str(tree["model"]["class_path"]).rpartition(".")[2]
    name = rate_name(method, kind)
    data = dict(tree.get("data", {}))
    shots, fraction = data.pop("shots", None), data.pop("fraction", None)
    known = data_of(check(tree))  # of images or of texts
    dataset = str(known.row.name if hasattr(known, "row") else known.dataset)
    monitor, several = tree.get("checkpoint", {}).get("monitor"), getattr(known, "several", False)
    description = SweepConfig.from_content({  # one model, whose config is the run's, one method and one dataset
        "models": {str(tree["model"]["init_args"].get("name", "model")): {"config": tree}},
        "methods": {method: {"adapter": path_of(type(task.adapter)), name: float(getattr(task, name))}},
        "datasets": {dataset: data | {"dataset": dataset}},
        "budgets": [budget(shots) if shots else budget(float(fraction)) if fraction else "100%"],
        "seeds": [int(tree.get("seed_everything") or 0)],
        "tune": {"monitor": monitor or f"val/{task.measure(task.tuned_by, several).name}"},
    })  # fmt: skip
    job = search_job(typed, Path(command.named[-1]), description, words.command("tune"))
    if typed.dry_run:
        return jobs.dry_run(job)
    ((method, chosen),) = run_search(job, ["tune", *others], None).items()
    if job.outcome.stopped or chosen is None:
        return 0 if job.outcome.stopped else 1
    best = []
    for option, value in chosen.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        print(f"Best {option} of {method}: {text}")
        group = "" if "." in option else "model." if option in RATES else "model.adapter."
        best += [f"--{group}{option}", text]
    print(f"Next: randlora-pl fit {shlex.join([*others, *best])}")
    return 0


def run_search(job: Job, words: list[str], config: Path | None) -> dict[str, Tree | None]:
    """Search, write and print the result, and return the best candidate of each method, None if none worked.

    ``words`` start each of several processes, without the options. The comments of ``config`` begin the config with the
    best candidates; None writes no config. If it is submitted, nothing is returned.
    """
    from randlora_pl.data import ImageData
    from randlora_pl.language import LabelledTexts, TextData
    from randlora_pl.sweep.expand import data_of
    from randlora_pl.utils.run_files import environment

    search, folder = job.search, job.folder
    assert search is not None
    for label, cell in {cell.labels.dataset: cell for cell in job.chosen}.items():
        data = data_of(cell.tree)
        if is_text(cell.tree):  # texts need a tokenizer to be read
            assert isinstance(data, LabelledTexts | TextData)
            if data.validation == 0 and data.dataset not in OWN_TEXTS:
                raise UserError(f"datasets.{label}: nothing is held out. Add data.validation: N to tune.set.")
            continue
        with redirect_stderr(io.StringIO()):  # its remarks are errors here
            data.setup("validate")
            loader = data.val_dataloader()
        none = isinstance(data, ImageData) and not len(data.samples("val"))
        if isinstance(loader, list) or none:  # a list: the data have no loader
            raise UserError(f"datasets.{label}: tuning needs validation images, and none are held out.")
    # read before the search, which takes long
    comments = [] if config is None else config.read_text(encoding="utf-8").splitlines(True)
    if not jobs.run(job, words):
        return {}
    made = {name: value for name, value in environment().items() if name in ("version", "git_commit")}
    report = {"command": job.same} | made | search.report()
    table = markdown(report, search.measure)
    files = {FILE: json.dumps(report, indent=1, ensure_ascii=False) + "\n", "tuning.md": table}
    if config is not None:
        head = "".join(line for line in comments if line.startswith("#"))
        files["tuned.yaml"] = config_text(search.tuned(), head)
    for name, text in files.items():
        write_text(folder.path / name, text)
    print("\n".join(["", table, *search.remarks()]))
    first, *others = reversed(files)
    print(f"Written: {folder.path / first}, {' and '.join(others)} in the same folder; {jobs.summary(job)}")
    best = search.chosen()
    if job.outcome.stopped:
        print(f"Stopped, because {job.outcome.stopped}. Resume with: {job.same}")
    elif without := [method for method in search.names if method not in best]:
        kept = "" if config is None else "; the config keeps their values"
        print(f"No candidate worked for: {', '.join(without)}{kept}. See {job.place}/cells")
    return {method: best.get(method) for method in search.names}


def search_job(typed: SearchOptions, file: Path, description: SweepConfig, same: str) -> Job:
    """Return the search of the options without running it."""
    from randlora_pl.sweep.search import Search

    folder = SweepFolder(typed.output or Path("runs") / "tune" / file.stem, "tune.yaml")
    with errors_in(file):
        ranges: Tree = {}
        for word in typed.search:
            name, equals, text = word.partition("=")
            low, dots, high = text.partition("..")
            if not (name and equals and text):
                raise UserError(f"--search {word}: expected NAME=VALUE,VALUE or NAME=LOW..HIGH, such as rank=1..64.")
            ends = {"low": parse_value(low), "high": parse_value(high)}
            ranges[name] = ends if dots else [parse_value(value) for value in text.split(",")]
        tune = description.tune | ({"search": ranges} if ranges else {})
        given = {"sampler": typed.sampler, "trials": typed.trials, "pruner": typed.pruner}
        tune |= {name: value for name, value in given.items() if value is not None}
        fit(tune, Tune, "tune")
        chosen = typed if isinstance(typed, CellOptions) else CellOptions()  # of a run, all
        whole = replace(description, root=chosen.root, tune=tune)
        search = Search(whole, folder)
        for word in chosen.only:
            key, _, text = word.partition("=")
            if key not in ("model", "dataset", "method"):
                raise UserError(f"--only {word}: a search is restricted by model, dataset or method.")
            search.restrict(f"{key}s", labels_of(word, text, list(getattr(search.small, f"{key}s"))))
        cells = search.known()
        jobs.check_root_is_read(cells, chosen.root)
    job = Job(whole, cells, folder, typed, same, search)
    jobs.choose(job)
    search.restrict("datasets", [cell.labels.dataset for cell in job.chosen])
    job.cells = job.chosen = search.known()
    return job


def markdown(report: Tree, measure: "Measure") -> str:
    """Return a table of candidates: the metric of the search, its mean over datasets, budgets and models."""
    monitor, decimals = report["monitor"], measure.decimals
    what = f"Validation {measure.word}" if measure.word else monitor
    what += " in percent" if decimals is None else ""

    def shown_as(value: float) -> str:
        return f"{100 * value:.1f}" if decimals is None else f"{value:.{decimals}f}"

    where = " from the own rate of each method on" if report["sampler"] == "climb" else ""
    seeds = f"seed {report['seeds'][0]}, the {report['finalists']} best of each method with all seeds."
    by_rule = report.get("rule") == LOWEST
    about = f"{what}, the mean over models, datasets and budgets; no test sample was read. "
    about += rule_text(report) if by_rule else f"Every candidate{where} with {seeds}"
    lines = [about, "", *(_margins(report) if by_rule else [])]
    header = ["method", "tried", *(f"seed {seed}" for seed in report["seeds"]), "mean", ""]
    rows = []
    for method, facts in report["methods"].items():
        for entry in facts["tried"]:
            values = {key: value for key, value in entry.items() if key not in (monitor, "runs", "failed")}
            by_seed = entry[monitor]
            cells = [shown_as(by_seed[str(s)]) if str(s) in by_seed else "" for s in report["seeds"]]
            mean = shown_as(fmean(by_seed.values())) if by_seed else ""
            reason = shorten(entry.get("failed", ""), 120)
            failed = f"failed: {reason}" if reason and not reason.startswith(PRUNED) else reason
            mark = "chosen" if values == facts["chosen"] else failed
            rows.append([method, shown(values), *cells, mean, mark])
    return "\n".join([*lines, *markdown_table(header, rows, (0, 1, len(header) - 1))]) + "\n"


def _margins(report: Tree) -> list[str]:
    """Return a table of the chosen rates, and of how far each is from failing."""
    chosen = {label: entry["chosen"] for label, entry in report["methods"].items() if entry["chosen"]}
    options = [name for name in RATES if any(name in rates for rates in chosen.values())]
    rows = []
    for label, rates in chosen.items():
        own = [f"{rates[name]:g}" if name in rates else "" for name in options]
        rows.append([label, *own, *("; ".join(filter(None, next_higher(report, label, name))) for name in options)])
    header = ["method", *(NAMES[name] for name in options), *(f"next higher {NAMES[name]}" for name in options)]
    return [*markdown_table(header, rows, range(len(header))), "", BREAKS, ""] if rows else []


def config_text(description: SweepConfig, head: str) -> str:
    """Return a description as a config: comments, then an entry a line; the provenance of its rates is next to it."""
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
