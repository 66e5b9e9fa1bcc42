"""Commands as typed functions, and what several of them check and print.

Parser, help page and completion of a command follow from the signature and the docstring of its function. Positional
parameters are words, keyword-only ones are options, and a ``bool`` is a switch. A parameter whose type is a dataclass
stands for the options that are its fields. `Words` receives what was typed. The docstring is the help page: its text,
``Examples``, ``Args``, ``Note`` and ``Returns`` (the exit code). ``adapter/export.py`` is an example.
"""

import argparse
import dataclasses
import inspect
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from randlora_pl.utils.errors import TooLargeImageError, UnreadableImageError, UserError, near, out_of_memory
from randlora_pl.utils.options import Option, Rest, Words, misfit
from randlora_pl.utils.text import group_names, printable, table

if TYPE_CHECKING:
    import torch

_NEEDED = inspect.Parameter.empty


class _Parser(argparse.ArgumentParser):
    """Parser of the options of one command, whose ``prog`` begins with ``randlora-pl``."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the options, typed with ``-`` or ``_``, and the other words."""
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        split = [word.partition("=") for word in args or ()]
        words = [f"{known.get(name.replace('_', '-'), name)}{equals}{value}" for name, equals, value in split]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise an error of one line instead of printing the usage."""
        hint = ""
        if "unrecognized" in message:
            unknown = message.removeprefix("unrecognized arguments: ").split()[0]
            options = [action.option_strings[0] for action in self._actions if action.option_strings]
            hint = near(unknown.partition("=")[0], options) if unknown.startswith("-") else ""
        elif wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            hint = near(wrong[1], re.findall(r"[^', ]+", wrong[2]))
        raise UserError(f"{self.prog.removeprefix('randlora-pl ')}: {message}.{hint} See: {self.prog} --help")


class _Parameter:
    """Option of a command, or word that is typed without a name; ``owner`` is the parameter whose field it is."""

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

    def add_to(self, parser: argparse.ArgumentParser) -> None:
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
        if not self.is_word:
            settings |= {"dest": self.name, "required": self.default is _NEEDED}
        parser.add_argument(*(self.names or [self.name]), **settings)

    def read(self, value: Any) -> Any:
        """Return the typed value, which must fit its type, as the function takes it."""
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
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", text, flags=re.M)
    return {name: " ".join(words.split()).removesuffix(".") for name, words in entries}


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
        self.parameters: list[_Parameter] = []
        for key, each in self.signature.items():
            kind = self.hints[key]
            if dataclasses.is_dataclass(kind):
                own = dict(texts)
                for base in inspect.getmro(self.hints[key]):
                    own = _explained(sections(base.__doc__).get("Attributes", "")) | own
                shown = kind if each.default is _NEEDED else each.default
                self.parameters += [
                    _Parameter(field, part, getattr(shown, field, _NEEDED), own.get(field, ""), owner=key)
                    for field, part in get_type_hints(kind, include_extras=True).items()
                ]
            elif kind not in (Words, Rest):
                is_word = each.kind is not each.KEYWORD_ONLY
                self.parameters.append(_Parameter(key, kind, each.default, texts.get(key, ""), is_word))

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

    def parser(self) -> argparse.ArgumentParser:
        """Return its parser."""
        parser = _Parser(f"randlora-pl {self.name}", add_help=False, allow_abbrev=False)
        for each in self.parameters:
            each.add_to(parser)
        return parser

    def arguments(self, words: list[str]) -> dict[str, Any]:
        """Return the arguments of its function for typed words.

        Raises:
            UserError: A word is wrong.
        """
        values_by_name: dict[str, Any] = {name: Words(words) for name, kind in self.hints.items() if kind is Words}
        rest = next((name for name, kind in self.hints.items() if kind is Rest), "")
        if rest:
            parsed, values_by_name[rest] = self.parser().parse_known_args(words)
        else:
            parsed = self.parser().parse_intermixed_args(words)
        typed = vars(parsed)
        owned: dict[str, dict[str, Any]] = {each.owner: {} for each in self.parameters}
        for each in self.parameters:
            if typed.get(each.name) is not None:
                owned[each.owner][each.name] = each.read(typed[each.name])
        values_by_name |= owned.pop("", {})
        for owner, values in owned.items():
            default = self.signature[owner].default
            values_by_name[owner] = (
                self.hints[owner](**values) if default is _NEEDED else dataclasses.replace(default, **values)
            )
        return values_by_name


def layer_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], every: bool) -> str:
    """Return a plain table.

    Args:
        rows: Per layer ``layer``, ``shape`` and the values; None for a missing value.
        columns: Key and title of each value; a group of layers shows the mean, and the range of whole numbers.
        every: If True, one row per layer instead of one per group.
    """
    rows = list(rows)
    shapes = [" x ".join(map(str, row["shape"])) for row in rows]
    groups = (
        {(row["layer"], shape): [place] for place, (row, shape) in enumerate(zip(rows, shapes, strict=True))}
        if every
        else group_names((row["layer"], shape) for row, shape in zip(rows, shapes, strict=True))
    )
    body = [
        [name, shapes[own[0]], str(len(own)), *(_mean([rows[place].get(key) for place in own]) for key in columns)]
        for (name, _), own in groups.items()
    ]
    header = ["layer", "out x in", "layers", *columns.values()]
    return table(header, body, optional=("base's", "layers", "out x in", "rank"))


def _mean(values: Sequence[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if all(isinstance(value, int) for value in known):
        low, high = min(known), max(known)
        return str(low) if low == high else f"{low} to {high}"
    return f"{sum(known) / len(known):.4g}"


def entry(name: str, text: str, indent: int = 2, column: int = 30) -> str:
    """Return one option with its explanation, wrapped next to it.

    Args:
        name: The option as the user types it.
        text: Its explanation.
        indent: Spaces before the name.
        column: Column where the explanation starts.
    """
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    body = textwrap.fill(printable(text), width, initial_indent=" " * column, subsequent_indent=" " * column)
    head = " " * indent + name
    return head + body[len(head) :] if len(head) < column else f"{head}\n{body}"


@contextmanager
def counting(what: str, total: int | None = None, of: str = "") -> Iterator[Callable[[int], None]]:
    """Yield a function that adds to a count, which is shown on a terminal: ``OF: 3 of 10 WHAT``.

    Args:
        what: Plural noun of what is counted.
        total: Final count; None if unknown.
        of: What it belongs to, such as a dataset.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    among = "" if total is None else f" of {total:,}"
    columns = (TextColumn(f"{{task.description}}{{task.completed:,}}{among} {what}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(of and f"{of}: ", total=total)
        yield lambda count: progress.advance(task, count)


def print_json(content: object) -> int:
    """Print a listing for another program; return the exit code of the command."""
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))
    return 0


def spelled(name: str) -> str:
    """Return an option as the user types it."""
    return f"--{name.replace('_', '-')}"


def check_output(path: Path, overwrite: bool | None = None) -> None:
    """Refuse an output that exists, unless ``--overwrite`` is given; None if the command has no such option."""
    if path.exists() and not overwrite:
        instead = "nothing is overwritten" if overwrite is None else "or --overwrite to replace it"
        raise UserError(f"{path} exists; give another --output, {instead}.")


def check_parent(path: Path) -> None:
    """Refuse a file whose folder does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"The folder {path.parent} does not exist; make it first: mkdir -p {path.parent}")


def check_file(path: Path, overwrite: bool | None = None) -> None:
    """Refuse an output as `check_output` does, and one that cannot be a file."""
    check_output(path, overwrite)
    if path.exists() and not path.is_file():
        raise UserError(f"--output: {path} is a folder or a device; give a file.")
    check_parent(path)


def pick_device(name: str) -> "torch.device":
    """Return a device of this machine; ``auto`` selects the fastest one, others raise an error if they do not exist."""
    import torch

    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise UserError(f"--device {name} is not on this machine; there is {', '.join(there)}.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give cpu, cuda, cuda:1 and so on.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} is not on this machine; the last one is {device.type}:{count - 1}.")
    return device


@contextmanager
def advised(smaller: str, unreadable: str = "", too_large: str = "") -> Iterator[None]:
    """Raise errors of one line, with advice, for what can go wrong while a model works.

    Args:
        smaller: Option to try if memory runs out.
        unreadable: What to do about an image that cannot be read.
        too_large: What to do about an image that is too large, if something else.
    """
    try:
        yield
    except UnreadableImageError as error:
        hint = too_large if too_large and isinstance(error, TooLargeImageError) else unreadable
        raise UserError(error.what, hint, error.where) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory; try {smaller}") from error
