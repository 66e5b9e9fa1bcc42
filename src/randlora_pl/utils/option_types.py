"""Types of options and words of commands: how each is typed, explained, and converted."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from randlora_pl.utils.files.run_files import find_adapter, find_run, find_runs


@dataclass(frozen=True)
class Option:
    """Part of a type that explains and converts a parameter, as in ``Annotated[Path, Option("DIR")]``.

    Attributes:
        value: Name of the value on the help page; by default it follows from the type.
        help: Explanation, unless the docstring of the command has one.
        read: Function that converts the typed value.
        names: How the option is typed, if not like the parameter.
        repeated: True if the option is typed again for each value of a sequence.
    """

    value: str = ""
    help: str = ""
    read: Callable[[Any], Any] | None = None
    names: tuple[str, ...] = ()
    repeated: bool = False


Adapter = Annotated[Path, Option("ADAPTER", "Adapter folder or .safetensors file, or a run", find_adapter)]
Run = Annotated[Path, Option("RUN", "Run folder, or runs/NAME for its newest run", find_run)]
Runs = Annotated[Sequence[Path], Option("RUN", "Run folders or adapters", find_runs)]
Folder = Annotated[Path, Option("DIR")]
File = Annotated[Path, Option("FILE")]
Device = Annotated[str, Option("DEVICE", "cpu, cuda, mps ..., auto is the best available")]
Overwrite = Annotated[bool, Option(help="Replace the output if it exists")]
Json = Annotated[bool, Option(help="Print the result as JSON")]
Root = Annotated[
    str | None,
    Option("PATH", "Folder with the data (default: the user's data folder)", names=("--root", "--data.root")),
]
Weights = Annotated[
    Sequence[Path], Option("FILE", "Weights file of a base model that this machine does not have", repeated=True)
]
"""For `register_weights`."""


class Words(list[str]):
    """The words behind the name of a command. They are not parsed if the function has no other parameter."""

    def command(self, name: str, *without: str) -> str:
        """Return the typed command, without some options of one value."""
        typed = list(self)
        for option in without:
            if option in typed:
                at = typed.index(option)
                del typed[at : at + 2]
        return shlex.join(["randlora-pl", *name.split(), *typed])


class Rest(list[str]):
    """The words that are not options of the command."""
