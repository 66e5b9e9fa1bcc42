"""Types of values before heavy imports: jsonargparse itself checks each value against its option's annotation."""

import json
import re
import typing
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from randlora_pl.run.options.compose import Command, parse_value
from randlora_pl.run.options.validate import file_with
from randlora_pl.utils import options
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.documents import parse_yaml

_TYPES: dict[str, Any] = {name: getattr(typing, name) for name in ("Annotated", "Any", "Literal", "Optional", "Union")}
_TYPES |= {kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple)}
_TYPES |= {name: check for name, check in vars(options).items() if isinstance(check, options.Check)}
_TYPES |= {check.__name__: check for check in (options.at_least, options.between)}


def check_type(command: Command, key: str, kind: str, value: Any) -> None:
    """Refuse a value that does not have the type of its option.

    Args:
        command: The command.
        key: Short name of the option.
        kind: Its annotation.
        value: Its value.

    Raises:
        UserError: The value has another type; the message has the line of a config.
    """
    typed = command.values.get(key)
    text = json.dumps(value, default=str) if typed is None else typed
    if not (message := _type_error(key, kind, text, typed is not None)):
        return
    if typed is not None and typed[:1] in ("[", "{"):
        try:
            parse_yaml(typed)
        except yaml.YAMLError as error:
            hint = "Put single quotes inside, in which a backslash is itself: \"['.*attn\\.(q|v)']\""
            what = f"--{key} is not valid YAML: {getattr(error, 'problem', None) or error}."
            raise UserError(what, hint * ("\\" in typed)) from None
    file = None if typed is not None else file_with(command, key)
    line = file and line_numbers(file).get(key)
    raise UserError(message, where=f"{file}, line {line}" if line else str(file or ""))


@cache
def _type_error(key: str, kind: str, text: str, typed: bool) -> str:
    """Return the error of a value that does not have the type of its option; else an empty text.

    Args:
        key: Short name of the option.
        kind: Its annotation; one that names a class is left to the parser.
        text: The value as typed, else as JSON.
        typed: True if it was typed.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from randlora_pl.run.options.parser_messages import parse_message

    try:
        expected = eval(kind, {"__builtins__": {}}, _TYPES)
    except (NameError, SyntaxError, TypeError):
        return ""
    if expected is str and not typed and text == "null":  # which the parser takes for a text
        return f"--{key}: expected a text, not None"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=expected)
    value = text if typed else json.loads(text)
    value = int(value) if isinstance(value, float) and value.is_integer() else value  # sweeps take 6.0 for 6
    try:
        if not typed and not isinstance(value, str | None):  # as text, `no` and 5 would pass as a text
            for name in reversed(key.split(".")):
                value = {name: value}
            parsed = parser.parse_object(value)
        else:
            parsed = parser.parse_args([f"--{key}={text if value is None else value}"])
    except (ArgumentError, RecursionError) as error:
        return parse_message(str(error))
    wrong = options.misfit(parsed[key], expected, f"--{key}")
    return f"{wrong}: give {wrong.wanted}." if wrong else ""


def unquoted(kind: str, value: Any) -> Any:
    """Return a number that a config has in quotes as a number, as the parser does; any other value unchanged."""
    kinds = re.findall(r"\w+", kind)
    quoted = isinstance(value, str) and "str" not in kinds and not {"int", "float"}.isdisjoint(kinds)
    return parse_value(value) if quoted else value


def line_numbers(file: Path) -> dict[str, int]:
    """Return the line of every option of a config, by short names (see `flatten`)."""
    found: dict[str, int] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            plain = name.value in ("class_path", "init_args")
            key = prefix if plain else f"{prefix}.{name.value}".strip(".")
            if name.value != "init_args":
                found[key] = name.start_mark.line + 1
            walk(key, value)

    walk("", yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader))
    return found
