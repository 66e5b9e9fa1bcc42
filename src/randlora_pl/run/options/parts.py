"""Checks of adapters in a list, which is one value of a config: their names, options and types."""

from typing import Any

from randlora_pl.run.options.classes import INNER, LISTED
from randlora_pl.run.options.compose import Command
from randlora_pl.run.options.validate import adapters, known_class
from randlora_pl.run.options.value_types import check_type
from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.signatures import OTHER_NAMES


def check_parts(command: Command, option: str, parts: Any) -> None:
    """Check a list of adapters, and correct the spelling of their classes.

    Args:
        command: The command.
        option: Short name of the option.
        parts: Its value; None if it is not given.

    Raises:
        UserError: The value is anything but a list of adapters, or a class, an option or a value is wrong.
    """
    if parts is None:
        return
    if not (isinstance(parts, list) and all(isinstance(part, dict) and "class_path" in part for part in parts)):
        raise UserError(
            f"--{option} is {brief(parts)}: give a list, such as '[{{class_path: LoRA, rank: 8}}, RandLoRA]'."
        )
    for place, part in enumerate(parts):
        name = known_class(part["class_path"], adapters(), "adapter", f"--{option}")
        if name is None:
            continue
        part["class_path"], known = name, adapters()[name].options
        for key, value in part.get("init_args", {}).items():
            if key == "targets":
                raise UserError(f"--{option}: all parts adapt the same layers. Set --model.targets instead of targets.")
            if key not in known:
                hint = near(OTHER_NAMES.get(key, key), known) or f" Its options are {', '.join(known)}."
                raise UserError(f"--{option}: {name} has no option {brief(key)}.{hint}")
            own = f"{option}.{place}.{key}"
            if key == LISTED:
                check_parts(command, own, value)
            elif key == INNER:
                part["init_args"][key] = inner = {"class_path": "LoRA"} | value
                check_parts(command, own, [inner])
            else:
                check_type(command, own, known[key].kind, value)
