"""``compare-methods``: methods on your own images with a recommendation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from randlora_pl.commands import sweep_job as jobs
from randlora_pl.commands.common import Command
from randlora_pl.commands.sweep import config_of_run
from randlora_pl.commands.sweep_job import WorkOptions
from randlora_pl.data.catalog import find
from randlora_pl.data.locations import root_of
from randlora_pl.run.options.classes import options_of, takes_texts, task_of
from randlora_pl.run.options.compose import is_option, merge, nested, normalize, read_config, short_name
from randlora_pl.run.options.mistakes import check_here
from randlora_pl.run.options.shipped import find_config
from randlora_pl.sweep import RATES, Seeds, SweepConfig, Tree, budget, fit, is_zero_shot, members
from randlora_pl.utils.errors import UserError, errors_in
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
    seeds: Sequence[int] = SEEDS,
    options: WorkOptions,
) -> int:
    """Compare methods on your own images, and recommend one of them.

    Pass a base model and the options of fit. The command searches the rates of each method on validation images, trains
    with the best ones over several seeds, and reads the test images once. It writes one page, DIR/index.html, and
    prints its first sentence. Run the same command again to resume after Ctrl-C.

    Examples:
        randlora-pl compare-methods --config clip_vitb32 --data.root PATH --budget 2h
        randlora-pl compare-methods --config clip_vitb32 --data.root PATH --dry-run     only the plan

    Args:
        config: Base model of the comparison: a bundled config or a file
        methods: Run only these methods
        budget: Time for all of it, such as 30m or 1h30m: rates, seeds and tests. The plan is printed first.
        grid: Sweep or file with the methods and their sizes
        margin: Points of accuracy that a larger method must gain to be worth it
        seeds: Seeds of the tests
        output: Folder to write (default: runs/compare/DATA_MODEL)
        dry_run: Only print the plan
    """
    for name in config:
        if {"methods", "models"} & read_config(find_config(name)).keys():
            raise UserError(f"--config {name} is a sweep, not a base model.", f"Run it: randlora-pl sweep {name}")
    _check_words(config, others)
    from randlora_pl.commands.comparison import Comparison
    from randlora_pl.sweep.timing import seconds_of

    seconds = seconds_of(budget) if budget else None
    if budget and options.jobs > 1:
        raise UserError("--budget is the time of one process. Leave out --jobs or --budget.")
    fit(list(seeds), Seeds, "--seeds")
    of_run = [word for name in config for word in ("--config", name)] + others
    description, tree = described(of_run, methods, grid, seeds)
    ((model, *_), (data, *_)) = description.models, description.datasets
    output = options.output or Path("runs") / "compare" / f"{data}_{model}".replace(" ", "-")
    same = words.command("compare-methods")
    return Comparison(description, of_run, tree, same, options, output, seconds, margin).run()


_BASE = "Choose one: --config clip_vitb32. List them: randlora-pl config list"
_FRESH = "Every method starts from the pretrained model. Remove it."
_REPLACED = {
    "resume": "Run the same command again to resume.",
    "max_hours": "Set --budget, the time for all of a comparison.",
    "seed_everything": "Set --seeds 1 2 3 4 5.",
    **dict.fromkeys(("ckpt_path", "from_adapter", "from_form"), _FRESH),
    "model.adapter": "The methods come from --grid.",
    **dict.fromkeys((f"model.{rate}" for rate in RATES), "The rates are searched. Remove it."),
}
"""Options of `fit` that a comparison does not have, and what to do."""


def _check_words(base: Sequence[str], others: Sequence[str]) -> None:
    """Refuse options that a comparison does not have."""
    typed = [word.partition("=")[0] for word in filter(is_option, others)]
    names = {word: short_name(word).replace("-", "_") for word in typed}
    for word, name in names.items():
        for replaced, instead in _REPLACED.items():
            if f"{name}.".startswith(f"{replaced}."):
                raise UserError(f"compare-methods does not accept {word}.", instead)
        if "." not in name and name != "model":
            Command("compare-methods", compare_methods).parser().error(f"unrecognized arguments: {word}")
    if not base and "model.name" not in names.values():
        raise UserError("compare-methods needs a base model for your own images.", _BASE)


def _check_task(tree: Tree) -> None:
    """Refuse tasks and data on which adapters cannot be compared, by their traits."""
    from randlora_pl.sweep.expand import data_of, kind_of

    name, data, kind = str(tree["model"]["class_path"]), tree.get("data", {}), kind_of(tree)
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
        raise UserError("A comparison needs two methods.", f"Choose two or more of them: {', '.join(labels)}")
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
