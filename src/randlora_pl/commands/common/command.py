"""Commands as typed functions: parser, help page and completion follow from the signature and the docstring.

Positional parameters are words, keyword-only ones are options, and a ``bool`` is a switch. A parameter whose type is a
dataclass stands for the options that are its fields. `Words` receives what was typed. The docstring is the help page:
its text, ``Examples``, ``Args``, ``Note`` and ``Returns`` (the exit code). ``adapter/merge.py`` is an example.
"""

import argparse
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from randlora_pl.commands.common.terminal import entry, spelled
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.options import Option, Rest, Words, misfit

_NEEDED = inspect.Parameter.empty


class CommandParser(argparse.ArgumentParser):
    """Parser of the options of one command.

    Args:
        verb: The typed command, for messages.
    """

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"randlora-pl {verb}", add_help=False, allow_abbrev=False)
        self.verb = verb

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the options, typed with ``-`` or ``_``, and the other words."""
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        split = [word.partition("=") for word in args or ()]
        words = [f"{known.get(name.replace('_', '-'), name)}{equals}{value}" for name, equals, value in split]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise an error of one line instead of printing the usage.

        Raises:
            UserError: Always.
        """
        hint = ""
        if "unrecognized" in message:
            unknown = message.removeprefix("unrecognized arguments: ").split()[0]
            options = [action.option_strings[0] for action in self._actions if action.option_strings]
            hint = near(unknown.partition("=")[0], options) if unknown.startswith("-") else ""
        elif wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            hint = near(wrong[1], re.findall(r"[^', ]+", wrong[2]))
        raise UserError(f"{self.verb}: {message}.{hint} See: randlora-pl {self.verb} --help")


class Parameter:
    """Option or word of a command.

    Args:
        name: Name of the parameter.
        kind: Its type.
        default: Its default, or `inspect.Parameter.empty`.
        text: Its explanation; by default the one of its type.
        is_word: True if it is typed without a name.
        owner: Parameter of the function whose field it is, if any.
    """

    def __init__(self, name: str, kind: Any, default: Any, text: str, is_word: bool = False, owner: str = "") -> None:
        self.name, self.kind, self.default, self.owner = name, kind, default, owner
        self.each, self.is_word = kind, is_word
        option = None
        while (origin := get_origin(kind)) not in (None, Literal):  # Annotated, Sequence, or a union with None
            option = option or next((part for part in get_args(kind) if isinstance(part, Option)), None)
            kind = get_args(kind)[0]
            self.each = kind if origin is Sequence else self.each
        self.plain, self.option, self.many = kind, option or Option(), self.each is not self.kind
        self.text = text or self.option.help
        bare = name.rstrip("_")
        self.names = () if is_word else self.option.names or (spelled(f"no_{bare}" if default is True else bare),)
        self.value = self.option.value or {int: "N", float: "X", Path: "PATH", bool: ""}.get(kind, "NAME")
        dots = " ..." if self.many and not self.option.repeated else ""
        self.head = f"{self.names[0] if self.names else ''} {self.value}{dots}".strip()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a ``Literal``."""
        return get_args(self.plain) if get_origin(self.plain) is Literal else ()

    def add_to(self, parser: CommandParser) -> argparse.Action:
        """Add it to the parser of its command; values that are not typed are absent from the result."""
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": self.text}
        if self.plain is bool:
            settings["action"] = "store_false" if self.default is True else "store_true"
        else:
            settings |= {"metavar": self.value, "type": str if self.choices else self.plain}
            settings["choices"] = self.choices or None
        if self.many and self.option.repeated:
            settings["action"] = "append"
        elif self.many:
            settings["nargs"] = "+" if self.default is _NEEDED or not self.is_word else "*"
            settings["action"] = "store" if self.is_word else "extend"
        elif self.is_word and self.default is not _NEEDED:
            settings |= {"nargs": "?", "default": None}  # its default would be converted
        if self.is_word:
            return parser.add_argument(self.name, **settings)
        return parser.add_argument(*self.names, dest=self.name, required=self.default is _NEEDED, **settings)

    def read(self, value: Any) -> Any:
        """Return the typed value as the function takes it.

        Raises:
            UserError: A check of its type does not hold.
        """
        name = self.names[0] if self.names else self.value
        for each in value if self.many else [value]:
            if wrong := misfit(each, self.each, name):
                raise UserError(f"{wrong}: give {wrong.wanted}.")
        return _read(value, self.kind)

    def shown(self, column: int) -> str:
        """Return its lines on the help page."""
        notes = [" | ".join(self.choices)] if self.choices else []
        if not isinstance(self.default, bool) and self.default not in (_NEEDED, None, "", ()):
            notes.append(f"default: {self.default}")
        return entry(self.head, self.text + (f" ({', '.join(notes)})" if notes else ""), 2, column)


def _read(value: Any, kind: Any) -> Any:
    """Return a value converted by the functions of its type, the innermost first."""
    inner = get_args(kind)
    if get_origin(kind) is Sequence:
        return [_read(each, inner[0]) for each in value]
    if get_origin(kind) in (None, Literal):
        return value
    value = _read(value, inner[0])
    for option in inner[1:]:
        value = option.read(value) if isinstance(option, Option) and option.read else value
    return value


def sections(docstring: str | None) -> dict[str, str]:
    """Return the parts of a docstring by their titles; the text before them has the title ""."""
    titles = "Examples|Args|Attributes|Returns|Note"
    first, *parts = re.split(rf"^({titles}):\n", inspect.cleandoc(docstring or ""), flags=re.M)
    texts = (textwrap.dedent(text).strip() for text in parts[1::2])
    return {"": first.strip()} | dict(zip(parts[::2], texts, strict=True))


def _explained(text: str) -> dict[str, str]:
    """Return the explanations in a section by name, without their last stop."""
    found = re.findall(r"^(\w+): (.*(?:\n .*)*)", text, flags=re.M)
    return {name: " ".join(words.split()).removesuffix(".") for name, words in found}


def first_sentence(text: str) -> str:
    """Return the first sentence of a help page, without its stop."""
    return re.split(r"(?<=[.:])\s|\n\n", text)[0].replace("\n", " ").rstrip(".:")


class Command:
    """Command of the program.

    Args:
        name: Its name as typed, such as ``adapter merge``.
        function: Its function.
        docstring: Its help page, if not the docstring of the function.
    """

    def __init__(self, name: str, function: Callable[..., int], docstring: str | None = None) -> None:
        self.name, self.function = name, function
        self.parts = sections(docstring or function.__doc__)
        self.signature = inspect.signature(function).parameters
        self.hints = get_type_hints(function, include_extras=True)
        texts = _explained(self.parts.get("Args", ""))
        self.parameters: list[Parameter] = []
        for key, each in self.signature.items():
            kind = self.hints[key]
            if dataclasses.is_dataclass(kind):
                own = dict(texts)
                for base in inspect.getmro(self.hints[key]):
                    own = _explained(sections(base.__doc__).get("Attributes", "")) | own
                shown = kind if each.default is _NEEDED else each.default
                self.parameters += [
                    Parameter(field, part, getattr(shown, field, _NEEDED), own.get(field, ""), owner=key)
                    for field, part in get_type_hints(kind, include_extras=True).items()
                ]
            elif kind not in (Words, Rest):
                is_word = each.kind is not each.KEYWORD_ONLY
                self.parameters.append(Parameter(key, kind, each.default, texts.get(key, ""), is_word))

    @property
    def raw(self) -> bool:
        """True if its function reads the typed words itself."""
        return not self.parameters and Words in self.hints.values()

    @property
    def needed(self) -> list[str]:
        """Words and options that must be typed, as on the help page."""
        return [each.head for each in self.parameters if each.default is _NEEDED]

    @property
    def page(self) -> str:
        """Its help page."""
        column = min(27, max((len(each.head) for each in self.parameters), default=0) + 4)
        options = "\n".join(each.shown(column) for each in self.parameters)
        usage = " ".join(["randlora-pl", self.name, *self.needed])
        code = f"Exit code: {self.parts['Returns']}" if "Returns" in self.parts else ""
        examples = textwrap.indent(self.parts.get("Examples", usage), "  ")
        blocks = [self.parts[""], examples, options, self.parts.get("Note", ""), code]
        return "\n\n".join(filter(None, blocks)) + "\n"

    def parser(self) -> CommandParser:
        """Return its parser."""
        parser = CommandParser(self.name)
        for each in self.parameters:
            each.add_to(parser)
        return parser

    def arguments(self, words: list[str]) -> dict[str, Any]:
        """Return the arguments of its function for typed words.

        Raises:
            UserError: A word is wrong.
        """
        found: dict[str, Any] = {name: Words(words) for name, kind in self.hints.items() if kind is Words}
        rest = next((name for name, kind in self.hints.items() if kind is Rest), "")
        if rest:
            parsed, found[rest] = self.parser().parse_known_args(words)
        else:
            parsed = self.parser().parse_intermixed_args(words)
        typed = vars(parsed)
        owned: dict[str, dict[str, Any]] = {each.owner: {} for each in self.parameters}
        for each in self.parameters:
            if typed.get(each.name) is not None:
                owned[each.owner][each.name] = each.read(typed[each.name])
        found |= owned.pop("", {})
        for owner, values in owned.items():
            default = self.signature[owner].default
            found[owner] = self.hints[owner](**values) if default is _NEEDED else dataclasses.replace(default, **values)
        return found
