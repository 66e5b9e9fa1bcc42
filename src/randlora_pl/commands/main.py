"""Entry point: ``main(args)`` for the shell, scripts, tests and notebooks; the table of the commands and their help.

Commands that need no PyTorch answer at once. It is imported to build a model, and to read options of classes.
"""

import argparse
import ast
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from randlora_pl.commands.common import Command, entry, first_sentence
from randlora_pl.run.options.shipped import config_names
from randlora_pl.run.parallel.launch import launched, process_rank
from randlora_pl.utils import __version__
from randlora_pl.utils.errors import LostProcessError, Terminated, UserError, near, shorten, trouble_of_machine
from randlora_pl.utils.options import Option, Words
from randlora_pl.utils.own_classes import forget_named, import_named
from randlora_pl.utils.text import escape_unprintable_output, log_to_terminal, printable, silence_library_warnings

RUN: Mapping[str, str | Mapping[str, str]] = {
    **dict.fromkeys(("fit", "test", "validate"), "fit"),
    "predict": "predict",
    "adapter": {
        **dict.fromkeys(("info", "diff"), "adapter"),
        **dict.fromkeys(("merge", "add", "export"), "adapter.export"),
        **dict.fromkeys(("import", "push", "pull"), "adapter"),
    },
    "analyze": {
        **dict.fromkeys(("spectrum", "represent"), "analyze"),
        **dict.fromkeys(("cka", "landscape", "forgetting"), "analyze.models"),
        "kernel": "analyze.kernel",
    },
    "serve": "serve",
    **dict.fromkeys(("sweep", "tune"), "sweep"),
    "compare-methods": "compare_methods",
    **dict.fromkeys(("report", "compare"), "results"),
    "bench": dict.fromkeys(("train", "adapters", "batch"), "bench"),
}
LOOK_UP: Mapping[str, str | Mapping[str, str]] = {
    "datasets": "inspect",
    "data": dict.fromkeys(("get", "check", "show"), "data"),
    **dict.fromkeys(("models", "adapters"), "inspect"),
    "config": dict.fromkeys(("list", "cat", "cp", "check"), "config"),
    "doctor": "inspect",
    "completion": "main",
}
COMMANDS = {**RUN, **LOOK_UP}
"""Module of each command, in which a function has its name; for a group, the modules of its commands.

The docstring of the module that has the name of a group explains the group.
"""

_MEANT = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "run"), "fit"),
    **dict.fromkeys(("eval", "evaluate"), "test"),
    **dict.fromkeys(("infer", "classify", "generate"), "predict"),
}
"""Commands of other programs, and ours."""

_PAGE = f"""\
randlora-pl {__version__}: RandLoRA and its baselines on CLIP, DINOv2 and language models

  randlora-pl fit --config quickstart                      train and test a tiny CLIP in half a minute
  randlora-pl fit --config clip_vitb32 --data.dataset folder --data.root PATH --data.shots 16
  randlora-pl predict --adapter RUN/adapter --images PATH --output predictions.csv

{{}}

For the options of a command, run: randlora-pl COMMAND --help. --version prints the version.
With --import mine, any command finds your own methods and tasks in mine.py.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The words after ``randlora-pl``; by default the words of the command line.

    Returns:
        The exit code: 0, or 2 if the user must change something, 1 if another process was lost, 130
        after Ctrl-C, 143 after SIGTERM.
    """
    words, left = list[str](), iter(sys.argv[1:] if args is None else args)
    escape_unprintable_output()
    try:
        with raise_on_sigterm():
            forget_named()
            for word in left:
                option, _, module = word.partition("=")
                if option == "--import":
                    import_named(module or next(left, ""))
                else:
                    words.append(word)
            if not words or words[0] in ("--help", "-h", "help"):
                print(main_page(), end="")
                return 0
            if words[0] in ("--version", "version"):
                print(f"randlora-pl {__version__}")
                return 0
            return run(words)
    except KeyboardInterrupt as stop:
        ended = isinstance(stop, Terminated)
        word, text = "terminated" if ended else "interrupted", str(stop)
        if not text and isinstance(stop.__context__, LostProcessError):  # it came while that was on its way here
            text = f"it has lost {stop.__context__}"
        if process_rank() == 0 or (ended and launched()):  # torchrun ends all when one is lost, even the first
            _print(f"{word}{f'; {text}' if text else ''}")
        return 143 if ended else 130
    except BrokenPipeError:  # the reader of a pipe such as `| head` has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # also a full disk, a name that is too long, no permission, no memory: anywhere
        if os.environ.get("RANDLORA_PL_TRACEBACK"):
            raise
        if isinstance(error, LostProcessError):
            print(f"randlora-pl: error: process {process_rank()} has lost {error}", file=sys.stderr)
            return 1
        if not (trouble := str(error) if isinstance(error, UserError) else trouble_of_machine(error)):
            raise
        _print(f"error: {printable(trouble)}")
        return 2


def _print(message: str) -> None:
    """Print the end of a command, and the rank of a process other than the first."""
    text = f"{f'[process {process_rank()}] ' if process_rank() else ''}randlora-pl: {message}"
    print("\n".join(shorten(part, 1500) for part in text.split("\n")), file=sys.stderr)  # it may echo typed text


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, unless training, a server or the caller of `main` handles the signal.

    Lightning calls the previous handler after its own. This handler raises only while it is the installed one, so that
    training saves its step first.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def terminated(number: int, frame: Any) -> None:
        if os.getpid() != own:  # forked child process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif signal.getsignal(signal.SIGTERM) is terminated:
            raise Terminated

    def again(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, Terminated):  # raised in a weak reference's callback, which drops exceptions
            threading.Timer(0.01, os.kill, (own, signal.SIGTERM)).start()  # send it again after this hook
        else:
            before(lost)

    before, sys.unraisablehook = sys.unraisablehook, again
    signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        sys.unraisablehook = before
        if os.getpid() == own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main_page() -> str:
    """Return the help page of the program."""
    lines = []
    for title, commands in (("Run", RUN), ("Look up", LOOK_UP)):
        for number, name in enumerate(commands):
            inner = f"{' | '.join(members(name))}: " if members(name) else ""
            lines.append(entry(f"{'' if number else title:10}{name}", inner + summary(name), 0, 27))
    return _PAGE.format("\n".join(lines))


def run(words: list[str]) -> int:
    """Run a command, or print the help page of a command or group.

    Returns:
        The exit code: 2 for a command without a word that needs some, whose help page is printed then.

    Raises:
        UserError: The command is unknown.
    """
    name, *rest = words
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command.{_hint(name)} See: randlora-pl --help")
    if inner := members(name):
        if not rest or rest[0] in ("--help", "-h"):
            text = ast.get_docstring(_tree(name))
            lines = [entry(f"randlora-pl {name} {each}", summary(f"{name} {each}"), 2, 34) for each in inner]
            last = f"For the options of a command, run: randlora-pl {name} COMMAND --help"
            print("\n".join([text or "", "", *lines, "", last]))
            return 0
        if rest[0] not in inner:
            hint = f"{near(rest[0], inner)} Use one of {', '.join(inner)}; see: randlora-pl {name} --help"
            raise UserError(f"Unknown command {name} {rest[0]}.{hint}")
        name, *rest = f"{name} {rest[0]}", *rest[1:]
    function, asked = function_of(name), bool({"--help", "-h"} & set(rest))
    command = Command(name, function)
    silence_library_warnings()
    if command.raw:
        return function(Words(rest))
    if asked or (not rest and command.needed):
        print(command.page, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    arguments = command.arguments(rest)
    if name.partition(" ")[0] in ("analyze", "bench", "data"):  # they print the application's log
        log_to_terminal()
    return function(**arguments)


def _hint(word: str) -> str:
    """Return a hint on a word that is not a command: an option, a config, a command of ours or of another program."""
    if word.startswith("-"):
        return " The command comes first: randlora-pl fit ..."
    if word in config_names():
        return f" Did you mean: fit --config {word}?"
    meant = [_MEANT[word]] if word in _MEANT else [f"{name} {word}" for name in COMMANDS if word in members(name)]
    return f" Did you mean {' or '.join(map(repr, meant))}?" if meant else near(word, COMMANDS)


def members(name: str) -> tuple[str, ...]:
    """Return the commands of a group; of a command, none."""
    modules = COMMANDS.get(name)
    return tuple(modules) if isinstance(modules, Mapping) else ()


def _module(name: str) -> str:
    """Return the module with the function of a command, or with the explanation of a group."""
    group, _, command = name.partition(" ")
    modules = COMMANDS[group]
    return modules if isinstance(modules, str) else modules.get(command, group)


def _tree(name: str) -> ast.Module:
    """Parse the module of a command or group, without importing it."""
    path = Path(__file__).parent.joinpath(*_module(name).split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _definition(name: str) -> ast.FunctionDef:
    """Return the function of a command in the source of its module; a name that Python uses has ``_`` at its end."""
    names = [f"{name.rpartition(' ')[2].replace('-', '_')}{end}" for end in ("", "_")]
    return next(node for node in _tree(name).body if isinstance(node, ast.FunctionDef) and node.name in names)


def function_of(name: str) -> Callable[..., int]:
    """Return the function of a command, which its own module defines; an imported one may have its name, too."""
    module = import_module(f"randlora_pl.commands.{_module(name)}")
    function: Callable[..., int] = getattr(module, _definition(name).name)
    return function


def summary(name: str) -> str:
    """Return the first sentence on a command or group, without importing its module."""
    return first_sentence(ast.get_docstring(_tree(name) if members(name) else _definition(name)) or "")


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Option("SHELL", "The shell")]) -> int:
    """Print a script that lets the shell complete commands, options and choices.

    Examples:
        randlora-pl completion bash > ~/.local/share/bash-completion/completions/randlora-pl
        randlora-pl completion zsh > ~/.zfunc/_randlora-pl           with fpath+=~/.zfunc before compinit in ~/.zshrc
        randlora-pl completion fish > ~/.config/fish/completions/randlora-pl.fish
    """
    import shtab

    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return a parser of all commands with their options and choices."""
    root = argparse.ArgumentParser(prog="randlora-pl")
    root.add_argument("--version", action="store_true")
    commands = root.add_subparsers()
    for name in COMMANDS:
        if inner := members(name):
            group = commands.add_parser(name, add_help=False, help=_plain(summary(name))).add_subparsers()
            for member in inner:
                _add(group, member, f"{name} {member}")
        else:
            _add(commands, name, name)
    return root


def _add(commands: Any, typed: str, name: str) -> None:
    import shtab

    command = Command(name, function_of(name))
    if command.raw:  # it reads its words itself, and has a parser in its module
        parser: argparse.ArgumentParser = sys.modules[command.function.__module__].parser(name)
    else:
        parser = command.parser()
    for action in parser._actions:
        action.help = _plain(action.help or "")
        paths = ("resume", "run", "adapter", "ckpt_path", "from_adapter", "root", "data.root", "run.root")
        if action.dest in paths or action.metavar in ("ADAPTER", "DIR", "FILE", "PATH", "RUN", "[NAME=]PATH"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "CONFIG":
            action.choices = list(config_names())
    commands.add_parser(typed, parents=[parser], add_help=False, help=_plain(summary(name)))


def _plain(text: str) -> str:
    """Return a text without signs that shells and argparse read."""
    return re.sub(r"[^\w ,()/=+-]", "", text)


if __name__ == "__main__":
    sys.exit(main())
