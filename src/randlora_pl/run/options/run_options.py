"""Parser of the options of runs as a shell completes them, from the source text."""

import argparse
import re
from collections.abc import Iterable

from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.language.catalog import DATASETS, LABELLED
from randlora_pl.run.options.class_index import Option, trainer_options
from randlora_pl.run.options.compose import FOLDER_OPTIONS
from randlora_pl.run.options.shipped import config_names
from randlora_pl.run.options.validate import FORMS, IN_CONFIGS, class_choices, data_class, groups_of, tasks
from randlora_pl.utils.options import literal_words


def run_options(verb: str) -> argparse.ArgumentParser:
    """Return a parser with every option of ``fit``, ``validate`` or ``test``, and its choices."""
    parser = argparse.ArgumentParser(add_help=False)
    named: dict[str, Iterable[str]] = {
        "config": config_names(),
        **{name: known for name, known in class_choices().items() if name != "model.adapter.inner"},
        "data.dataset": {**CATALOG, **DATASETS, **LABELLED},
        "from_form": FORMS,
    }
    groups = groups_of({"model": None}) | {
        group: {name: option for source in known.values() for name, option in source.options.items()}
        for group, known in class_choices().items()
        if group != "model.adapter.inner"
    }
    groups |= {
        "data": {name: option for task in tasks() for name, option in data_class(task).options.items()},
        "trainer": trainer_options(),
    }
    options = {f"{group}.{name}": option for group, own in groups.items() for name, option in (own or {}).items()}
    for name in dict.fromkeys([*named, *FOLDER_OPTIONS[verb], *sorted(IN_CONFIGS), *options]):
        choices = named.get(name) or _choices(options.get(name))
        parser.add_argument(f"--{name}", choices=list(choices) or None, help=_help(options.get(name)))
    for name in ("--help", "--help-all", "--print_config", *(["--dry-run"] if verb == "fit" else [])):
        parser.add_argument(name, action="store_true")
    return parser


def _choices(option: Option | None) -> list[str]:
    if option is None or option.kind.startswith("bool"):
        return ["true", "false"] if option else []
    return list(dict.fromkeys(literal_words(option.type)))


def _help(option: Option | None) -> str:
    """Return the first sentence of an option's explanation, without signs that shells and argparse read."""
    return re.sub(r"[^\w ,()/=+-]", "", option.sentence) if option else ""
