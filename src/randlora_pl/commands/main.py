"""Entry point: ``main(args)`` for the shell, scripts, tests and notebooks.

Commands that need no PyTorch answer at once; heavy imports happen only when a model must be built.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from randlora_pl.run.parallel.launch import launched, process_rank
from randlora_pl.utils.errors import LostProcessError, Terminated, UserError, near, shortened
from randlora_pl.utils.own_classes import forget_named, import_named
from randlora_pl.utils.text.formatting import escape_unprintable_output, printable
from randlora_pl.utils.version import __version__

VERBS = {
    "fit": "fit:fit_verb",
    "validate": "fit:evaluate_verb",
    "test": "fit:evaluate_verb",
    "predict": "predict.images:predict_verb",
    "compare-methods": "results.compare_methods:compare_verb",
    "report": "results.report:report_verb",
    "compare": "results.compare_runs:compare_runs_verb",
    "sweep": "sweep.sweep:sweep_verb",
    "tune": "sweep.tune:tune_verb",
    "zeroshot": "results.zeroshot:zeroshot_verb",
    "adapter": "adapter.verbs:adapter_verb",
    "analyze": "analyze.verbs:analyze_verb",
    "serve": "serve:serve_verb",
    "data": "data.verbs:data_verb",
    "bench": "bench.verbs:bench_verb",
    "datasets": "inspect.catalogs:datasets_verb",
    "models": "inspect.catalogs:models_verb",
    "adapters": "inspect.catalogs:adapters_verb",
    "config": "inspect.config:config_verb",
    "doctor": "inspect.doctor:doctor_verb",
    "completion": "completion:completion_verb",
}
_NAMED = ("validate", "test")  # both commands use one function, which gets the command's name
GROUPS = ("adapter", "analyze", "bench", "data")  # their commands have help pages of their own
_NEVER_BARE = ("fit", "validate", "test", "predict", "serve")
"""Commands that print their help without options and exit with 2, so that no script takes it for a run."""

_MEANT = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "run"), "fit"),
    **dict.fromkeys(("eval", "evaluate"), "test"),
    **dict.fromkeys(("infer", "classify", "generate"), "predict"),
}
"""Commands of other programs, and ours."""

LONGEST_LINE = 1500
"""Most characters per line of a message, which may echo typed text."""

PAGE = f"""\
randlora-pl {__version__}: RandLoRA and its baselines on CLIP, DINOv2 and language models

  randlora-pl fit --config quickstart                      train and test a tiny CLIP in half a minute
  randlora-pl fit --config clip_vitb32 --data.dataset folder --data.root PATH --data.shots 16
  randlora-pl predict --adapter RUN/adapter --images PATH --output predictions.csv

Run       fit        train and test an adapter; --resume RUN resumes after a crash
          test       test an adapter: --adapter FOLDER or --run RUN (validate: on validation images)
          predict    classify images or texts with an adapter, or answer prompts
          adapter    info | diff | merge | add | export | import | push | pull: inspect and convert adapters
          analyze    spectrum | represent | cka | landscape | forgetting: adapters beyond accuracy
          serve      classify images over HTTP, with a page to drop images on
          sweep      a grid of models, datasets, budgets, methods and seeds, which can be resumed
          tune       search learning rates for a sweep on validation images
          compare-methods   every method on 16 shots of the digits, in one table
          report     tables and plots of a sweep, compared with the paper's numbers
          compare    differences in configs and results of runs
          zeroshot   test a pretrained CLIP and compare it with published accuracies
          bench      data NAME | train | captions | answers | adapters: measure speed and memory
Look up   datasets   list datasets; datasets NAME shows one in full
          data       get NAME | check NAME | show NAME: download, verify and preview datasets
          models     list backbones
          adapters   list methods; adapters NAME explains the options of one
          config     list | cat NAME | cp NAME: bundled configs; check FILE: mistakes in yours
          doctor     check if a run can start here, and what is missing
          completion bash | zsh | fish: a script that lets the shell complete commands and options

For the options of a command, run: randlora-pl COMMAND --help. --version prints the version.
With --import mine, any command finds your own methods and tasks in mine.py.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The words behind ``randlora-pl``; by default the words of the command line.

    Returns:
        The exit code: 0, or 2 if the user must change something, 1 if another process was lost, 130
        after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if args is None else args)
    escape_unprintable_output()
    try:
        with raise_on_sigterm():
            return _run(words)
    except UserError as error:
        if os.environ.get("RANDLORA_PL_TRACEBACK"):
            raise
        _print_error(str(error))
        return 2
    except LostProcessError as lost:
        if os.environ.get("RANDLORA_PL_TRACEBACK"):
            raise
        print(f"randlora-pl: error: process {process_rank()} has lost {lost}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        ended = isinstance(stop, Terminated)
        word = "terminated" if ended else "interrupted"
        if process_rank() == 0 or (ended and launched()):  # torchrun ends all when one is lost, even the first
            print(f"{_which()}randlora-pl: {word}{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 143 if ended else 130
    except BrokenPipeError:  # the reader of a pipe such as `| head` has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # a full disk, a name that is too long, no permission, no memory: anywhere
        if os.environ.get("RANDLORA_PL_TRACEBACK"):
            raise
        from randlora_pl.run.error_messages import trouble_of_machine

        if not (trouble := trouble_of_machine(error)):
            raise
        _print_error(trouble)
        return 2


def _which() -> str:
    """Return the rank of a process other than the first, for its messages."""
    return f"[process {process_rank()}] " if process_rank() else ""


def _print_error(mistake: str) -> None:
    """Print the error, and the rank of a process other than the first."""
    text = f"{_which()}randlora-pl: error: {printable(mistake)}"
    print("\n".join(shortened(part, LONGEST_LINE) for part in text.split("\n")), file=sys.stderr)


def _without_imports(words: list[str]) -> list[str]:
    """Import the modules that ``--import`` names, and return the other words."""
    rest, left = list[str](), iter(words)
    for word in left:
        option, _, module = word.partition("=")
        if option == "--import":
            import_named(module or next(left, ""))
        else:
            rest.append(word)
    return rest


def _run(words: list[str]) -> int:
    forget_named()
    words = _without_imports(words)
    if not words or words[0] in ("--help", "-h", "help"):
        print(PAGE, end="")
        return 0
    if words[0] in ("--version", "version"):
        print(f"randlora-pl {__version__}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        hint = _config_hint(verb) or _meant_hint(verb) or near(verb, VERBS)
        raise UserError(f"{verb!r} is not a command.{hint} See: randlora-pl --help")
    asked = {"--help", "-h"} & set(rest)
    if (asked and verb not in GROUPS) or (not rest and verb in _NEVER_BARE):
        from randlora_pl.commands.help.pages import page

        print(page(verb), end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    module, _, name = VERBS[verb].partition(":")
    function: Callable[[list[str]], int] = getattr(import_module(f"randlora_pl.commands.{module}"), name)
    return function([verb, *rest] if verb in _NAMED else rest)


def _config_hint(word: str) -> str:
    """Return a hint to use ``fit`` if a config was typed without a command (``randlora-pl quickstart``)."""
    if word.startswith("-"):
        return " The command comes first: randlora-pl fit ..."
    from randlora_pl.run.options.shipped import config_names

    return f" Did you mean: fit --config {word}?" if word in config_names() else ""


def _meant_hint(word: str) -> str:
    """Return a hint for a command of another program, or of one of our groups: ``adapter export``."""
    if word in _MEANT:
        return f" Did you mean {_MEANT[word]!r}?"
    groups = {name: import_module(f"randlora_pl.commands.{name}.verbs").VERBS for name in GROUPS}
    found = [f"{name} {word}" for name, verbs in groups.items() if word in verbs]
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


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


if __name__ == "__main__":
    sys.exit(main())
