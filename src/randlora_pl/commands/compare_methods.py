"""``compare-methods``: methods on your own images with a recommendation, or a sweep of all methods."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from randlora_pl.commands import sweep_job as jobs
from randlora_pl.commands.common import Command, spelled
from randlora_pl.commands.sweep import config_of_run, run_sweep
from randlora_pl.commands.sweep_job import SweepOptions
from randlora_pl.data.catalog import find
from randlora_pl.data.locations import root_of
from randlora_pl.run.options.classes import options_of, takes_texts, task_of
from randlora_pl.run.options.compose import is_option, merge, nested, normalize, read_config, short_name
from randlora_pl.run.options.mistakes import check_here
from randlora_pl.run.options.shipped import find_config
from randlora_pl.sweep import RATES, Seeds, SweepConfig, Tree, budget, fit, is_zero_shot, members
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import NotNegative, Option, Rest, Words

GRID, SEEDS = "own_data", [1, 2, 3, 4, 5]


def compare_methods(
    words: Words,
    others: Rest,
    *,
    config: Annotated[Sequence[str], Option("CONFIG", names=("--config", "-c"), repeated=True)] = (),
    methods: Sequence[str] = (),
    budget: Annotated[str, Option("TIME")] = "",
    grid: Annotated[str, Option("SWEEP")] = GRID,
    margin: Annotated[float, NotNegative] = 1.0,
    options: SweepOptions,
) -> int:
    """Compare methods on your own images, and recommend one of them.

    Pass a base model and the options of fit. The command searches the rates of each method on validation images, trains
    with the best ones over several seeds, and reads the test images once. It writes one page, DIR/index.html, and
    prints its first sentence. Run the same command again to resume after Ctrl-C.

    With a sweep, or without a config, the command runs the sweep and ranks nothing. It prints the mean and standard
    error of each method and of two classifiers of raw pixels, also to DIR/table.md.

    Examples:
        randlora-pl compare-methods --config clip_vitb32 --data.root PATH --budget 2h
        randlora-pl compare-methods --config clip_vitb32 --data.root PATH --dry-run     only the plan
        randlora-pl compare-methods                                 all methods on 16 shots of the digits, 3 seeds
        randlora-pl compare-methods --methods RandLoRA-6 --seeds 4 5

    Args:
        config: Base model of the comparison, or a sweep to run: a bundled config or a file
        methods: Run only these methods
        budget: Time for all of it, such as 30m or 1h30m: rates, seeds and tests. The plan is printed first.
        grid: Sweep or file with the methods and their sizes
        margin: Points of accuracy that a larger method must gain to be worth it
        output: Folder to write (default: runs/compare/DATA_MODEL, or runs/sweeps/NAME)
        dry_run: Only print the plan, or the cells of the sweep
        root: Place of your own images, or the folder with the datasets of a sweep
        seeds: Seeds of the tests (default: 1 2 3 4 5, or the sweep's)
    """
    contents = {name: read_config(find_config(name)) for name in config}
    sweeps = [name for name, content in contents.items() if {"methods", "models"} & content.keys()]
    typed = [f"--{name}" for name, own in (("budget", budget), ("grid", grid != GRID), ("margin", margin != 1)) if own]
    if not sweeps and (config or typed or options.root or any("." in word for word in filter(is_option, others))):
        _check_words(config, options, others)
        from randlora_pl.commands.comparison import Comparison
        from randlora_pl.sweep.timing import seconds_of

        seconds = seconds_of(budget) if budget else None
        if budget and options.jobs > 1:
            raise UserError("--budget is the time of one process. Leave out --jobs or --budget.")
        if options.seeds is not None:
            fit(list(options.seeds), Seeds, "--seeds")
        of_run = [word for name in config for word in ("--config", name)] + others
        of_run += [] if options.root is None else ["--data.root", options.root]
        description, tree = described(of_run, methods, grid, options.seeds or SEEDS)
        ((model, *_), (data, *_)) = description.models, description.datasets
        output = options.output or Path("runs") / "compare" / f"{data}_{model}".replace(" ", "-")
        same = words.command("compare-methods")
        return Comparison(description, of_run, tree, same, replace(options, root=None), output, seconds, margin).run()
    if others:
        Command("compare-methods", compare_methods).parser().error(f"unrecognized arguments: {' '.join(others)}")
    if len(config) > 1:
        raise UserError(f"--config {sweeps[0]} is a sweep, which is not merged with others. Pass it alone.")
    if typed:
        raise UserError(f"{typed[0]} needs a base model, and {sweeps[0]} is a sweep.", _BASE)
    if methods:
        options = replace(options, only=[*options.only, f"method={','.join(methods)}"])
    code, job = run_sweep(config[0] if config else "compare_methods", options, words.command("compare-methods"))
    if job is None or not any(map(job.folder.results, job.chosen)):
        return code
    from randlora_pl.lab.baselines import method_tables
    from randlora_pl.lab.report.collect import read_sweep

    text = method_tables(read_sweep(job.folder.path), job.chosen)
    write_text(job.folder.path / "table.md", text)
    print(f"\n{text}\nAlso in {job.folder.path / 'table.md'}")
    return code


_BASE = "Name one: --config clip_vitb32. All: randlora-pl config list"
_OF_SWEEPS = ("only", "skip_missing", "shard", "tune", "slurm", "max_hours", "launcher")
_FRESH = "Every method starts from the pretrained model. Remove it."
_REPLACED = {
    "resume": "Run the same command again to resume.",
    "seed_everything": "Set --seeds 1 2 3 4 5.",
    **dict.fromkeys(("ckpt_path", "from_adapter", "from_form"), _FRESH),
    "model.adapter": "The methods come from --grid.",
    **dict.fromkeys((f"model.{rate}" for rate in RATES), "The rates are searched. Remove it."),
}
"""Options of `fit` that a comparison does not have, and what to do."""


def _check_words(base: Sequence[str], options: SweepOptions, others: Sequence[str]) -> None:
    """Refuse options that a comparison does not have."""
    for name in _OF_SWEEPS:
        if getattr(options, name) not in (None, False, (), [], "local"):
            raise UserError(f"{spelled(name)} belongs to sweeps, and this is a comparison on own images. Remove it.")
    typed = [word.partition("=")[0] for word in filter(is_option, others)]
    names = {word: short_name(word).replace("-", "_") for word in typed}
    for word, name in names.items():
        for replaced, instead in _REPLACED.items():
            if f"{name}.".startswith(f"{replaced}."):
                raise UserError(f"compare-methods does not take {word}.", instead)
        if "." not in name and name != "model":
            Command("compare-methods", compare_methods).parser().error(f"unrecognized arguments: {word}")
    if not base and "model.name" not in names.values():
        raise UserError("compare-methods needs a base model for your own images.", _BASE)


def _check_task(tree: Tree) -> None:
    """Refuse tasks and data on which adapters cannot be compared, by their traits."""
    from randlora_pl.sweep.expand import data_of

    name, data = str(tree["model"]["class_path"]), tree.get("data", {})
    kind = task_of(name)
    if kind is None:
        raise UserError(f"The task {name} is not imported.", "Name its module: --import mine")
    by_hand = "Search the rate of each run, and compare them: randlora-pl tune --help"
    texts = takes_texts(kind)
    refusals = [
        (texts, f"{name} reads texts", "Write a sweep: docs/labelled_texts.md"),
        (not kind.has_classes, f"{name} predicts no classes", by_hand),
        ("prompts" in options_of(kind), f"{name} trains prompts", by_hand),
        (not texts and find(str(data.get("dataset", "digits"))).captions, "captions have no classes", by_hand),
        (getattr(data_of(tree), "several", False), "these images have several labels each", by_hand),
        (data.get("train_split") == "full", "none are held out", "Remove --data.train_split full."),
        (tree.get("trainer", {}).get("limit_test_batches") == 0, "none are tested", "Remove limit_test_batches."),
    ]
    for holds, what, instead in refusals:
        if holds:
            what = f"compare-methods compares adapters by classes of validation and test images, and {what}."
            raise UserError(what, instead)


def described(typed: list[str], methods: Sequence[str], name: str, seeds: Sequence[int]) -> tuple[SweepConfig, Tree]:
    """Return the methods of a grid with the base model and the data of the user, and the config of both.

    Raises:
        UserError: An option is wrong, the data are missing, or the methods cannot be compared on them.
    """
    command, tree = config_of_run(typed)
    check_here(command)
    _check_task(tree)
    file, grid = jobs.find_sweep(name)
    labels = [label for label in grid.methods if not is_zero_shot(label)]
    members("--methods", methods, labels, f"methods of {name}")
    kept = [label for label in labels if label in methods or not methods]
    if len(kept) < 2:
        raise UserError("A comparison needs two methods.", f"Name two or more of them: {', '.join(labels)}")
    if not getattr(task_of(str(tree["model"]["class_path"])), "trained_head", False):  # a new head cannot be tested
        kept += [label for label in grid.methods if is_zero_shot(label)]
    arguments, data = tree["model"].get("init_args", {}), tree.get("data", {})
    plain = {key: value for key, value in arguments.items() if key not in ("adapter", *RATES)}
    config = merge(normalize(nested(grid.options)), tree | {"model": tree["model"] | {"init_args": plain}})
    shots, fraction = data.get("shots"), data.get("fraction")
    place = {"dataset": "digits"} | {key: data[key] for key in ("dataset", "root") if key in data}
    label = root_of(str(place["root"])).resolve().stem if "root" in place else str(place["dataset"])
    with errors_in(file):
        description = SweepConfig.from_content({
            "title": f"Which adapter for {_label(label)}?",
            "models": {_label(str(arguments.get("name", "tiny"))): {"config": config}},
            "datasets": {_label(label): place},
            "budgets": [budget(shots) if shots else budget(float(fraction)) if fraction else "100%"],
            "methods": {label: facts for label, facts in grid.methods.items() if label in kept},
            "seeds": list(seeds),
        })  # fmt: skip
    return description, tree


def _label(text: str) -> str:
    """Return a name or a path as a label, without signs of a path or a pattern."""
    return re.sub(r"[^\w -]+", "-", text.rpartition("/")[2]).strip("-") or "images"
