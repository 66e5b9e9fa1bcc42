"""``fit``, ``validate`` and ``test``, and their help pages: the application's own options first, on one screen."""

import argparse
import sys
import textwrap
from collections.abc import Iterable

from randlora_pl.commands.common import entry, sections
from randlora_pl.data.catalog import CATALOG
from randlora_pl.language.catalog import DATASETS, LABELLED
from randlora_pl.run.options.classes import (
    Option,
    RunOptions,
    callback_classes,
    class_name,
    classes,
    data_class,
    method_with,
    options_by_group,
    options_of,
    summary,
)
from randlora_pl.run.options.compose import CLASSES, DEFAULTS, FOLDER_OPTIONS, compose, short_name
from randlora_pl.run.options.mistakes import FORMS, IN_CONFIGS
from randlora_pl.run.options.shipped import config_names
from randlora_pl.utils.options import Words, literal_words


def fit(words: Words) -> int:
    """Train an adapter, then test it; VisionLanguageTask, TextHeadTask and PromptTask also test the pretrained model.

    Everything about the run is written to runs/NAME/TIME: config, TensorBoard, log, checkpoint, adapter, results.json.
    runs/NAME/latest is a link to the newest run, and runs/NAME stands for its newest run in every command.

    Examples:
        randlora-pl fit --config quickstart
        randlora-pl fit --config clip_vitb32 --config lora --data.dataset cifar10 --data.shots 16
        randlora-pl fit --resume runs/quickstart/latest            resume after a crash or Ctrl-C
    """
    return _run("fit", words)


def test(words: Words) -> int:
    """Test an adapter on the test images of a dataset. Without an adapter, test the pretrained model.

    Examples:
        randlora-pl test --run runs/quickstart/latest              the config and adapter of a run
        randlora-pl test --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
    """
    return _run("test", words)


def validate(words: Words) -> int:
    """Test an adapter on the validation images, which are not used for training. Use it to choose hyperparameters.

    Examples:
        randlora-pl validate --run runs/quickstart/latest          the config and adapter of a run
        randlora-pl validate --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
    """
    return _run("validate", words)


def _run(command: str, words: Words) -> int:
    """Run a command, or print a help page; without options that is a mistake, so that no script takes it for a run."""
    asked = {"--help", "-h"} & set(words)
    if asked or not words:
        print(page(command), end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    typed = [word.partition("=")[0] for word in words]
    if helped := [short_name(word) for word in typed if word in [f"--{option}.help" for option in CLASSES]]:
        # the options of --model.help NAME, which jsonargparse names without --model, after seconds of imports
        composed = compose(command, words, DEFAULTS)
        option = helped[0].removesuffix(".help")
        known = classes(option)
        default = method_with("inside", True) if option == "model.adapter.inner" else next(iter(known))
        chosen = composed.values.get(helped[0]) or str(composed.flat().get(option) or default)
        if name := class_name(option, chosen, helped[0]):
            print(describe(known[name], f"--{option}."))
            return 0
    from randlora_pl.run.session import run_evaluation, run_fit

    if command == "fit":
        run_fit(words)
    else:
        run_evaluation(command, words)
    return 0


def page(verb: str) -> str:
    """Return the help page of a command, at most 60 lines."""
    parts = sections({"fit": fit, "test": test, "validate": validate}[verb].__doc__)
    lines = {"--config NAME": "Bundled config or a file. Repeat it to merge several, the last one wins"}
    if verb == "fit":
        again = "Resume this run. Typed options override its config. auto: the newest run of this name, unchanged"
        lines |= {f"--run.{name} VALUE": _short(option) for name, option in options_of(RunOptions).items()}
        lines |= {
            "--dry-run": "Print the start page (parameters, steps, memory) and write nothing",
            "--print_config": "Print the merged config. --print_config=skip_default: without defaults",
            "--resume RUN": f"{again}, if it is unfinished",
            "--from-adapter LORA": "Start a new run with the outputs of this trained LoRA (a run or an adapter)",
            "--from-form FORM": "beside: the adapter is added to it (default). absorbed: RandLoRA contains it",
        }
        for group, kind in callback_classes().items():
            lines |= {f"--{group}.{name}": _short(option) for name, option in options_of(kind).items()}
    tasks = classes("model")
    listed = {"model": _options(tasks.values()), "data": _options(map(data_class, tasks.values()))}
    hidden = ("adapter", "dataset", "prompts", "seed")
    own = {group: ", ".join(name for name in names if name not in hidden) for group, names in listed.items()}
    lines |= {
        "--seed_everything N": "Seed of the run: few-shot images, order, augmentation, bases (default: 0)",
        "--model TASK": f"{', '.join(tasks)}. Their options:",
        "  --model.": own["model"],
        "--model.adapter METHOD": ", ".join(classes("model.adapter")),
        "--model.adapter.OPTION": "See: randlora-pl adapters METHOD",
        "--model.prompts LEARNER": f"Of PromptTask: {', '.join(classes('model.prompts'))}",
        "--data.dataset NAME": f"See: randlora-pl datasets. Texts: {', '.join(DATASETS | LABELLED)}. Other options:",
        "  --data.": own["data"],
        "--trainer.OPTION": "Options of Lightning's Trainer, for example accelerator, devices, precision, "
        "accumulate_grad_batches",
    }
    blocks = [parts[""], textwrap.indent(parts["Examples"], "  "), "\n".join(map(entry, lines, lines.values()))]
    last = f"For all options, run: randlora-pl {verb} --help-all, --model.help TASK, --model.adapter.help METHOD\n"
    return "\n\n".join([*blocks, last])


def describe(kind: type, prefix: str) -> str:
    """Return the summary of a class and its options as typed: a prefix such as ``--model.adapter.``, and the name."""
    lines = [summary(kind), ""]
    for option in options_of(kind).values():
        default = "required" if option.written is None else f"default: {option.written.strip(chr(39))}"
        text = f"{option.help} ({option.choices}; {default})".replace("``", "")
        lines.append(entry(f"{prefix}{option.name}", text, column=38))
    return "\n".join([*lines, ""] if options_of(kind) else lines)


def _short(option: Option) -> str:
    """Return the first sentence of an option's explanation, with its default if it has one."""
    default = "" if option.default in (None, "") else f" (default: {(option.written or '').strip(chr(39))})"
    return f"{option.sentence.replace('``', '')}{default}"


def parser(verb: str) -> argparse.ArgumentParser:
    """Return a parser with every option of a command and its choices, as a shell completes them."""
    made = argparse.ArgumentParser(add_help=False)
    kinds = {option: classes(option) for option in CLASSES if option != "model.adapter.inner"}
    named: dict[str, Iterable[str]] = {
        "config": config_names(),
        **kinds,
        "data.dataset": {**CATALOG, **DATASETS, **LABELLED},
        "from_form": FORMS,
    }
    groups = options_by_group({}, data_class(None))
    groups |= {group: _options(known.values()) for group, known in kinds.items()}
    groups["data"] = _options(map(data_class, kinds["model"].values()))
    options = {f"{group}.{name}": option for group, own in groups.items() for name, option in (own or {}).items()}
    for name in dict.fromkeys([*named, *FOLDER_OPTIONS[verb], *sorted(IN_CONFIGS), *options]):
        option = options.get(name)
        choices = ["true", "false"] if option and option.kind is bool else literal_words(option.type) if option else []
        text = option.sentence if option else ""
        made.add_argument(f"--{name}", choices=list(dict.fromkeys(named.get(name, choices))) or None, help=text)
    for name in ("--help", "--help-all", "--print_config", *(["--dry-run"] if verb == "fit" else [])):
        made.add_argument(name, action="store_true")
    return made


def _options(kinds: Iterable[type]) -> dict[str, Option]:
    return {name: option for kind in kinds for name, option in options_of(kind).items()}
