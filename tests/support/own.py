"""Classes of a user, in a module of the working folder."""

import sys
from collections.abc import Callable, Iterator

import pytest

from randlora_pl.utils import own_classes


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Return what forgets, as a new process, the classes that were imported by name or registered."""
    path = [*sys.path]

    def forget() -> None:
        monkeypatch.setattr(own_classes, "_named", {})
        for each in (own_classes.METHODS, own_classes.TASKS):
            monkeypatch.setattr(each, "_classes", {})
        monkeypatch.setattr(sys, "path", [*path])
        for name in [name for name in sys.modules if name.partition(".")[0].startswith("mine")]:
            del sys.modules[name]

    forget()
    yield forget
    forget()
