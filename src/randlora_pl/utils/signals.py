"""SIGTERM outside a training: told in a line, with what a verb says of its work, like Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from randlora_pl.utils.errors import Terminated


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, unless a training, a server or the caller of `main` handles it.

    Lightning calls the handler that it finds after its own; only the installed one raises, so that a training saves its
    step first.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def terminated(number: int, frame: Any) -> None:
        if os.getpid() != own:  # a process that was forked from this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif signal.getsignal(signal.SIGTERM) is terminated:
            raise Terminated

    def again(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, Terminated):  # it came within a callback of a weak reference, which drops errors
            threading.Timer(0.01, os.kill, (own, signal.SIGTERM)).start()  # once the callback and this hook are over
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
