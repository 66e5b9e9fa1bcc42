"""Entry point: ``main(args)`` for the shell, scripts, tests and notebooks.

Commands that need no PyTorch answer at once. It is imported to build a model, and to read options of classes.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from randlora_pl.commands.table import main_page, run
from randlora_pl.run.error_messages import trouble_of_machine
from randlora_pl.run.parallel.launch import launched, process_rank
from randlora_pl.utils import __version__
from randlora_pl.utils.errors import LostProcessError, Terminated, UserError, shortened
from randlora_pl.utils.own_classes import forget_named, import_named
from randlora_pl.utils.text import escape_unprintable_output, printable


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The words behind ``randlora-pl``; by default the words of the command line.

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
        word = "terminated" if ended else "interrupted"
        if process_rank() == 0 or (ended and launched()):  # torchrun ends all when one is lost, even the first
            _print(f"{word}{f'; {stop}' if str(stop) else ''}")
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
    print("\n".join(shortened(part, 1500) for part in text.split("\n")), file=sys.stderr)  # it may echo typed text


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
