"""``fit``, ``validate`` and ``test``, and their help pages: the application's own options first, on one screen."""

import sys
import textwrap

from randlora_pl.commands.common.command import sections
from randlora_pl.commands.common.tables import entry
from randlora_pl.language.catalog import DATASETS, LABELLED
from randlora_pl.run.options.class_index import ClassSource, Option, read_classes
from randlora_pl.run.options.classes import CLASSES
from randlora_pl.run.options.compose import DEFAULTS, compose, short_name
from randlora_pl.run.options.validate import (
    CALLBACK_GROUPS,
    adapters,
    class_choices,
    data_class,
    known_class,
    tasks,
)
from randlora_pl.utils.option_types import Words


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
    if explained := class_page(command, words):
        print(explained)
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
    lines = [
        f"{parts['']}\n\n{textwrap.indent(parts['Examples'], '  ')}\n",
        _line("--config NAME", "Bundled config or a file. Repeat it to merge several, the last one wins"),
    ]
    if verb == "fit":
        again = "Resume this run. Typed options override its config. auto: the newest run of this name, unchanged"
        own = read_classes("run/options")["RunOptions"].options
        lines += [_line(f"--run.{name} VALUE", _short(option)) for name, option in own.items()]
        lines += [_line("--dry-run", "Print the start page (parameters, steps, memory) and write nothing")]
        lines += [_line("--print_config", "Print the merged config. --print_config=skip_default: without defaults")]
        lines += [_line("--resume RUN", f"{again}, if it is unfinished")]
        lines += [_line("--from-adapter LORA", "Start a new training where this run or adapter has ended")]
        lines += [
            _line("--from-form FORM", "beside: the adapter is added to it (default). absorbed: RandLoRA contains it")
        ]
        lines += [_line(f"--{group}.{name}", _short(option)) for group, name, option in _callback_options()]
    lines += [
        _line("--seed_everything N", "Seed of the run: few-shot images, order, augmentation, bases (default: 0)"),
        _line("--model TASK", f"{', '.join(tasks())}. Their options:"),
        *_names("model", {name: option for source in tasks().values() for name, option in source.options.items()}),
        _line("--model.adapter METHOD", f"{', '.join(adapters())}"),
        _line("--model.adapter.OPTION", "See: randlora-pl adapters METHOD"),
        _line("--model.prompts LEARNER", f"Of PromptTask: {', '.join(class_choices()['model.prompts'])}"),
        _line(
            "--data.dataset NAME",
            f"See: randlora-pl datasets. Texts: {', '.join(DATASETS | LABELLED)}. Other options:",
        ),
        *_names("data", {name: option for task in tasks() for name, option in data_class(task).options.items()}),
        _line(
            "--trainer.OPTION",
            "Options of Lightning's Trainer, for example accelerator, devices, precision, accumulate_grad_batches",
        ),
        "",
        f"For all options, run: randlora-pl {verb} --help-all, --model.help TASK, --model.adapter.help METHOD",
        "",
    ]
    return "\n".join(lines)


def class_page(verb: str, args: list[str]) -> str:
    """Return the options of the class of ``--model.help NAME``, ``--model.adapter.help NAME``; else an empty text.

    jsonargparse would name them without ``--model``, after seconds of imports.
    """
    asked = [word for word in args if word.partition("=")[0] in (f"--{option}.help" for option in CLASSES)]
    if not asked:
        return ""
    command = compose(verb, args, DEFAULTS)
    option = short_name(asked[0].partition("=")[0]).removesuffix(".help")
    known = class_choices()[option]
    default = "LoRA" if option == "model.adapter.inner" else next(iter(known))
    typed = command.values.get(f"{option}.help") or str(command.flat().get(option) or default)
    name = known_class(typed, known, "class", f"--{option}.help")
    return describe(known[name], f"--{option}.") if name else ""


def describe(source: ClassSource, prefix: str) -> str:
    """Return the summary of a class and its options as typed: a prefix such as ``--model.adapter.``, and the name."""
    lines = [source.summary, ""]
    for option in source.options.values():
        default = "required" if option.default is None else f"default: {option.default.strip(chr(39))}"
        text = f"{option.help} ({option.choices}; {default})".replace("``", "")
        lines.append(entry(f"{prefix}{option.name}", text, column=38))
    return "\n".join([*lines, ""] if source.options else lines)


def _callback_options() -> list[tuple[str, str, Option]]:
    classes = read_classes("run/callbacks")
    return [
        (group, option.name, option)
        for group, name in CALLBACK_GROUPS.items()
        if name in classes
        for option in classes[name].options.values()
    ]


def _line(name: str, text: str) -> str:
    return entry(name, text, column=30)


def _short(option: Option) -> str:
    """Return the first sentence of an option's explanation, with its default if it has one."""
    default = "" if option.default == "None" else f" (default: {(option.default or '').strip(chr(39))})"
    return f"{option.sentence.replace('``', '')}{default}"


def _names(group: str, options: dict[str, Option]) -> list[str]:
    """Return the options of a group on as few lines as they need."""
    names = ", ".join(f"{name}" for name in options if name not in ("adapter", "dataset", "prompts", "seed"))
    return [entry(f"  --{group}.", names, column=30)]
