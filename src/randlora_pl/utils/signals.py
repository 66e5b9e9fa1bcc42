"""SIGTERM outside training, handled like Ctrl-C: one line, with the command's own remark about its work."""

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
