"""Names of packages that are imported at first use."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import randlora_pl
from tests.support.products import in_one_item

PACKAGES = ("adapters", "adapters.methods", "run.callbacks", "data", "language", "models", "tasks")


@in_one_item("package", PACKAGES)
def test_every_exported_name_can_be_imported(package: str) -> None:
    module = importlib.import_module(f"randlora_pl.{package}")
    for name in module.__all__:
        assert getattr(module, name) is not None and name in dir(module)
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


@in_one_item("package", PACKAGES)
def test_no_exported_name_is_a_module(package: str) -> None:
    """Its import would hide the exported object."""
    folder = Path(randlora_pl.__file__).parent.joinpath(*package.split("."))
    exported = importlib.import_module(f"randlora_pl.{package}").__all__
    assert not set(exported) & {file.stem for file in folder.iterdir()}


def test_parsers_know_every_method_in_a_new_process() -> None:
    """They look for short names, such as DoRA's ``inner: NoLA``, among the subclasses that are imported."""
    code = (
        "from randlora_pl.adapters import Adapter, RandLoRA, methods;"
        "below = lambda kind: {kind.__name__}.union(*map(below, kind.__subclasses__()));"
        "assert set(methods.__all__) <= below(Adapter)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(randlora_pl.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
