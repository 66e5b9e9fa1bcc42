"""Messages of jsonargparse in one line."""

import re

from randlora_pl.utils.errors import near

WRAPPERS = ("Does not validate", "Parser key", "Problem with given class_path", "Not a valid subclass")
_NOISE = ("Expected a <class 'NoneType'>", "Expected a path but", "Given value", "Subtypes:", "Errors:")

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping such as {pattern: value}",
    "list": "a list such as [a,b]",
    "tuple": "a list such as [0.5,1]",
    "collections.abc.Iterable": "a list",
    "NoneType": "nothing",
}


def parse_message(message: str) -> str:
    """Return the short form of an error message of jsonargparse.

    Args:
        message: Message of jsonargparse: nested, with every alternative that did not fit.

    Returns:
        One line: the option, what was expected and what was given.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    option = "--" + ".".join(_without_repeats(keys)) if keys else ""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    useful = [line for line in lines if line and not line.startswith((*WRAPPERS, *_NOISE))]
    types = [_KINDS.get(name, name) for name in re.findall(r"Expected an? <class '([^']+)'>", message)]
    literals = re.findall(r"[^', ]+", ",".join(re.findall(r"Literal\[([^\]]*)\]", message)))
    types = [name for name in dict.fromkeys(types) if name != "nothing"]
    types += [f"one of {', '.join(dict.fromkeys(literals))}"] if literals else []
    given = re.findall(r"(?:Given|Got) value: (?:NestedArg\(.*val='(?=.*'\)))?(.*?)(?:'\))?$", message, re.MULTILINE)
    if types:
        value = given[0] if given else ""
        hint = near(value, literals) if value else ""
        if re.fullmatch(r"[\w./-]+", value):
            types = [name.replace("[a,b]", f"'[{value}]'") for name in types]
        return f"{option}: expected {' or '.join(types)}{f', not {value}' if value else ''}{'.' * bool(hint)}{hint}"
    first = useful[0] if useful else message.splitlines()[0]
    if first.startswith("Subclass types expect"):
        value = f", not {given[0]}" if given else ""
        first = f"expected the name of a class, or {{class_path: NAME, init_args: {{...}}}}{value}"
    return f"{option}: {first}" if option and not first.startswith(option) else first


def _without_repeats(keys: list[str]) -> list[str]:
    return [key for key, before in zip(keys, ["", *keys[:-1]], strict=True) if key != before]
