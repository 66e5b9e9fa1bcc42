"""Needs of a command beside its options: the dataset of its data folder, a base model, files and packages."""

import re
from importlib.util import find_spec

from randlora_pl.data.catalog import CATALOG, default_root, find, may_be_read, present
from randlora_pl.data.locations import root_of
from randlora_pl.data.validate import check_trains, format_of, formats_of
from randlora_pl.run.options.classes import data_class, options_of, takes_texts, task_of
from randlora_pl.run.options.compose import Command
from randlora_pl.utils.errors import UserError

LOGGERS = {"wandb": "wandb", "mlflow": "mlflow"}
"""Package of each logger that is not always installed, which is the name of its extra, too."""


def choose_dataset(command: Command) -> None:
    """Put the dataset of a root into the config unless a dataset was typed; one config that has both is complete.

    Raises:
        UserError: The files of the root fit no format, or several.
    """
    flat = command.flat()
    root, named = flat.get("data.root"), command.config.get("data", {}).get("dataset")
    alone = "data.root" in command.values or command.bare_root
    if root is None or "data.dataset" in command.values or (named is not None and not alone):
        return
    kind, place = data_class(task_of(str(flat.get("model")))).__name__, root_of(str(root))
    if kind != "ImageData":
        formats = ("jsonl", "csv") if kind == "LabelledTexts" else ("jsonl",)
        own = [name for name in formats if place.suffix == f".{name}" or (place / f"train.{name}").is_file()]
        if len(own) > 1:
            hint = "Choose: --data.dataset jsonl or --data.dataset csv"
            raise UserError(f"{place} has train.jsonl and train.csv.", hint)
        found = own[0] if own else named
    elif named is None:
        found = format_of(place) if place.exists() or any(formats_of(place)) else "folder"  # whose error has the layout
    else:  # the named one if it can be there, else the format that the files have
        row = CATALOG.get(named)
        fits = row is None or row.own or (row.layout and (present(row, place) or not any(formats_of(place))))
        found = named if fits else format_of(place)
    if found is not None:
        command.config["data"] = command.config.get("data", {}) | {"dataset": found}


def check_here(command: Command) -> None:
    """Check what a command needs: paths and packages of this machine, and a base model unless it prints a help page.

    Raises:
        UserError: Something is missing; the message has what to expect, or the command to get it.
    """
    flat = command.flat()
    check_loggers(flat.get("run.logger", "none"))
    task = task_of(str(flat["model"]))
    row = None if takes_texts(task) else find(str(flat.get("data.dataset", "digits")))
    typed = flat.get("data.root")
    root = default_root() if typed is None else root_of(str(typed))
    if row is not None and not row.own:
        if not present(row, root):
            from randlora_pl.data.readers import missing

            raise missing(row, root, f"the package {row.package} is not installed" if row.package else "")
    elif typed is not None and not root.exists() and not (row and may_be_read(row, root)):
        layout = row.layout if row else "a file of texts, or its folder"
        raise UserError(f"The data folder {typed} does not exist; expected {layout}. Set it with --data.root PATH")
    if command.verb == "fit" and row is not None:
        check_trains(row, flat.get("data.shots_file"))
    runs = not any(re.search(r"[-.]help(-all)?$", word) for word in command.typed)
    toy = task is not None and options_of(task)["name"].default == "tiny" and flat.get("model.name") is None
    if runs and toy:  # which is used only if it is named
        bases = "--config clip_vitb32, clip_vitl14 or dinov2_vitb14, or tiny_clip, a toy for images of 32 pixels"
        raise UserError(f"{command.verb} needs a base model.", f"Add {bases}. All models: randlora-pl models")


def check_loggers(names: str | list[str]) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        UserError: The message has the command to install the package.
    """
    for name in names if isinstance(names, list) else [names]:
        if (package := LOGGERS.get(name)) and find_spec(package) is None:
            raise UserError(f"--run.logger {name} needs a package: pip install '.[{package}]' in the checkout")
