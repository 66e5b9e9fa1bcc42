"""Imports that leave out what no command needs, and names that are imported at first use."""

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import randlora_pl
from randlora_pl.utils import quick_imports
from randlora_pl.utils.quick_imports import quick_imports as quick
from tests.support.products import in_one_item

HEAVY = "used_heavy"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages: a heavy one, which is deferred; torchmetrics counts as not imported."""
    package = tmp_path / HEAVY
    package.mkdir()
    (package / "__init__.py").write_text("class Thing: number = 7\ndef function(x): return 2 * x\n")
    (package / "part.py").write_text("VALUE = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quick_imports, "DEFERRED", (HEAVY, f"{HEAVY}.part", "absent_package", "absent_package.part"))
    monkeypatch.delitem(sys.modules, "torchmetrics", raising=False)
    yield tmp_path
    gc.unfreeze()
    for name in [name for name in sys.modules if name.startswith("used_")]:
        del sys.modules[name]


def write(folder: Path, text: str) -> None:
    (folder / "used_library.py").write_text(text)


def test_a_deferred_module_is_imported_at_its_first_use(packages: Path) -> None:
    write(
        packages,
        "import used_heavy, used_heavy.part\n"
        "from used_heavy import Thing, function\n"
        "from used_heavy.part import VALUE\n"
        "known = isinstance(3, Thing)\n"
        "def value(x: Thing): return function(2), Thing.number, isinstance(used_heavy.Thing(), Thing)\n",
    )
    with quick("used_library"):
        assert not gc.isenabled()
    assert gc.isenabled() and HEAVY not in sys.modules and f"{HEAVY}.part" not in sys.modules
    import used_library  # type: ignore[import-not-found]

    assert not used_library.known
    assert used_library.value(0) == (4, 7, True) and HEAVY in sys.modules
    import used_heavy.part  # type: ignore[import-not-found]

    assert used_heavy.part.VALUE == 5 and Path(used_heavy.__file__).parent == packages / HEAVY


@pytest.mark.parametrize("line", ["value = function(2)", "class Child(Thing): pass\nvalue = Child.number - 3"])
def test_a_use_in_the_import_itself_gets_the_real_module(packages: Path, line: str) -> None:
    write(packages, f"from used_heavy import Thing, function\n{line}\n")
    with quick("used_library"):
        pass
    assert sys.modules["used_library"].value == 4 and sys.modules[HEAVY].__file__


def test_a_library_that_needs_more_than_names_is_imported_as_usual(packages: Path) -> None:
    write(packages, "from used_heavy import function\nvalue = len(function.__code__.co_varnames)\n")
    with quick("used_library"):
        assert "used_library" not in sys.modules
        import used_library
    assert used_library.value == 1


def test_a_program_that_has_torchmetrics_gets_no_stand_ins(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", gc)
    write(packages, "import used_heavy\n")
    with quick("used_library"):
        assert gc.isenabled() and "used_library" not in sys.modules


CODE = """
import json, sys
from randlora_pl.commands.main import main
from randlora_pl.run import session
start, seen = session.start, {}
def watched(*args):
    app = start(*args)
    from lightning.pytorch import Callback
    class First(Callback):
        def on_train_batch_start(self, *args):
            seen["first step"] = sorted(sys.modules)
    app.trainer.callbacks.append(First())
    return app
session.start = watched
code = main(sys.argv[1:])
seen["end"] = sorted(sys.modules)
import matplotlib.figure, torch, torchmetrics, transformers, scipy.signal
from open_clip import hf_model
metric = torchmetrics.classification.MulticlassConfusionMatrix(2)
metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
figure, _ = metric.plot()
seen["works"] = [isinstance(figure, matplotlib.figure.Figure), hf_model.AutoConfig.for_model("bert").model_type,
    hf_model.transformers.__version__ == transformers.__version__, scipy.signal.windows.hann(3).tolist()]
print("SEEN" + json.dumps([code, seen]))
"""
HEAVY_MODULES = {"scipy.signal", "scipy.stats", "matplotlib.pyplot", "sklearn", "pandas", "transformers", "jinja2"}


@pytest.mark.slow
def test_fit_and_predict_import_little_and_lose_nothing(tmp_path: Path) -> None:
    def modules(*words: str) -> dict[str, list[str]]:
        environment = {**os.environ, "MPLBACKEND": "agg"}
        done = subprocess.run(
            [sys.executable, "-c", CODE, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        code, seen = json.loads(done.stdout.rpartition("SEEN")[2])
        assert code == 0
        assert seen.pop("works") == [True, "bert", True, [0.0, 1.0, 0.0]]
        return seen

    seen = modules("fit", "--config", "quickstart", "--data.steps", "1", "--run.root", "runs")
    assert not HEAVY_MODULES & set(seen["end"])
    assert not {"matplotlib.figure", "matplotlib.axes"} & set(seen["first step"])
    assert "matplotlib.figure" in seen["end"]  # the plots of the test
    assert len(seen["first step"]) < 4200  # 5,260 with all of them
    adapter = tmp_path / "runs/quickstart/latest/adapter"
    image = tmp_path / "runs/quickstart/latest/figures/confusion.png"
    seen = modules("predict", "--adapter", str(adapter), "--images", str(image), "--output", "-")
    assert not (HEAVY_MODULES | {"matplotlib.figure"}) & set(seen["end"])


def test_triton_finds_nothing_frozen_at_the_end(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with quick():
        pass
    quick_imports._unfreeze()
    assert gc.get_freeze_count()  # freeing a million objects takes time
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    quick_imports._unfreeze()
    assert not gc.get_freeze_count()


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
