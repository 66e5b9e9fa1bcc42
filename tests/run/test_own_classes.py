"""Methods, tasks and callbacks in a file of the user: trained, stored by import path, and loaded again on request."""

import ast
import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from randlora_pl import adapters, tasks
from randlora_pl.adapters import Adapter, LoRA, inject, load_adapter, save_adapter
from randlora_pl.interop.hub import make_card
from randlora_pl.run.options.classes import task_of
from randlora_pl.run.options.mistakes import check_here
from randlora_pl.run.session import prepare
from randlora_pl.sweep.plan import is_text
from randlora_pl.tasks import AdaptationModule, TextHeadTask
from randlora_pl.tasks.optim import TOWERS, default_learning_rate
from randlora_pl.tasks.restore import find_task
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import path_of
from tests.docs.pages import PAGES
from tests.support.cli import SMALL, Refused, Run

BOTH = PAGES["docs/method_in_20_lines.md"] + PAGES["docs/own_methods.md"]
METHOD, _, TASK, NUMBER, *_ = re.findall(r"```python\n(.*?)```", BOTH, flags=re.S)
MODULE = METHOD + TASK
TYPED = (
    *("--model", "mine.FocalTask", "--model.gamma", "1.5", "--model.adapter", "mine.RankOne"),
    *("--model.adapter.scale", "2", "--model.learning_rate", "0.1", "--trainer.callbacks", "mine.Announce"),
)
ONE = ("--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
MINE = ("--import", "mine")
COMPUTED = """
    def __post_init__(self):
        super().__post_init__()
        self.gamma = {1, 2}
"""
LONGER = [("test", "--run"), ("adapter", "merge")]
"""Commands that tests/docs/test_shell_blocks.py runs."""


@pytest.fixture
def mine(own: Callable[[], None], run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return what imports the module of the page as a program of the user does."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("mine.py").write_text(MODULE)

    def imported() -> Any:
        sys.path.append(str(Path.cwd()))
        return import_module("mine")

    return imported


def test_round_trip(run: Run, refused: Refused, own: Callable[[], None], mine: object) -> None:
    trained = run("fit", *SMALL, *TYPED, "--run.name", "mine")
    assert trained.code == 0, trained.err
    assert "Training FocalTask" in trained.out
    assert all("--import mine" in line for line in re.findall(r"randlora-pl .*", trained.out.partition("Next:")[2]))
    (folder,) = map(str, Path("runs/mine").glob("2*"))
    adapter = f"{folder}/adapter"
    commands = (
        ("test", "--run", folder, *ONE),
        ("test", "--adapter", adapter, *ONE),
        ("predict", "--adapter", adapter, "--images", f"{folder}/figures", "--output", "mine.csv"),
        ("adapter", "merge", adapter, "--output", "mine.safetensors"),
    )
    for words in commands:
        assert "Add --import mine" in refused(*words)  # nothing is left of the command before
        own()
        if words[:2] not in LONGER:
            result = run(*words, *MINE)
            assert result.code == 0, (words, result.err)
    own()
    assert "is finished" in refused("fit", "--resume", folder, *MINE)
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert (config["method"], config["metadata"]["task_class"]) == ("mine.RankOne", "mine.FocalTask")
    tests = [json.loads(file.read_text())["test/acc"] for file in sorted(Path("runs").glob("*/2*/results.json"))]
    assert len(tests) == 2 and len(set(tests)) == 1


def test_a_task_without_classes_works_or_is_refused_in_one_sentence(
    run: Run, refused: Refused, own: Callable[[], None]
) -> None:
    Path("mine_number.py").write_text(NUMBER)
    number = ("--import", "mine_number")
    trained = run("fit", *SMALL, "--model", "mine_number.MyNumberTask", "--data.steps", "4", "--run.name", "number")
    assert trained.code == 0 and re.search(r"test +mean error \d\.\d{3}, loss \d", trained.out), trained.err
    (folder,) = map(str, Path("runs/number").glob("2*"))
    results, config = (Path(folder, name).read_text() for name in ("results.json", "config.yaml"))
    facts = json.loads(results)
    assert facts["metric"] == "mae" and facts["test/mae"] > 0 and {"best/val/mae", "val/loss"} <= facts.keys()
    assert re.search(r"monitor: val/mae\n +mode: min", config)
    assert not {"figures", "test_per_class.csv"} & {file.name for file in Path(folder).iterdir()}
    picture = Path(folder, "digit.png")
    Image.new("L", (8, 8), 90).save(picture)
    words = ("predict", "--adapter", folder, "--images", str(picture), *number)
    told = run(*words, "--output", "-")
    header, row = told.out.splitlines()
    assert header == "image,number" and re.fullmatch(r"\S+,-?\d+\.\d{6}", row), told.err
    assert "--top-k needs a model that predicts classes" in refused(*words, "--top-k", "2", "--output", "x.csv")
    for refusing in (("serve",), ("adapter", "export", "--to", "onnx", "--output", "model.onnx")):
        adapter = [f"{folder}/adapter"] if refusing[0] == "adapter" else ["--adapter", folder]
        said = refused(*refusing[:2], *adapter, *refusing[2:], *number)
        assert "has no classes (it was trained by mine_number.MyNumberTask)" in said
    card = make_card(adapters.read_adapter(f"{folder}/adapter"), "me/number")
    assert f"| test mean error | {facts['test/mae']:.4g} |" in card and "and 128 of the head" in card
    assert "probabilities" not in card and "--to onnx --part image" in card


def test_the_steps_to_add_a_task_have_the_task_of_the_page() -> None:
    """With types and docstrings, which code of this program has, and the page's has not."""

    def plain(text: str) -> str:
        (kind,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
        kind.name = "Task"  # the page's is free also if this program has one
        for node in ast.walk(kind):
            match node:
                case ast.FunctionDef():
                    node.returns = None
                    for argument in node.args.args:
                        argument.annotation = None
            match node:
                case ast.FunctionDef(body=[ast.Expr(), *body]) | ast.ClassDef(body=[ast.Expr(), *body]):
                    node.body = body
        return ast.unparse(kind)

    steps = PAGES["CONTRIBUTING.md"].partition("## Add a task")[2]
    assert plain(re.findall(r"```python\n(.*?)```", steps, flags=re.S)[0]) == plain(NUMBER)


def test_a_run_that_could_not_be_loaded_again_is_refused_before_it_trains(refused: Refused, mine: object) -> None:
    wrong = {
        (
            "    scale: float = 1.0",
            "    def __init__(self, scale=1.0): ...",
        ): "RankOne has a constructor. Declare its options",
        ('"""Exponent of the weight."""', COMPUTED): "FocalTask: options that cannot be saved",
    }
    for number, ((old, new), message) in enumerate(wrong.items()):
        module = f"mine{number}"
        Path(f"{module}.py").write_text(MODULE.replace(old, new, 1))
        typed = [word.replace("mine.", f"{module}.") for word in TYPED]
        assert message in refused("fit", *SMALL, *typed)


def test_short_names_and_tasks_on_texts(run: Run, mine: object) -> None:
    Path("mine.py").write_text(
        f"{MODULE}\nfrom randlora_pl.language import CausalLMTask\n\nclass MyTexts(CausalLMTask): pass\n"
    )
    command = prepare("fit", ["--model", "mine.MyTexts", "--model.adapter", "RankOne", "--data.mask_prompt", "true"])
    assert command.flat()["model.adapter"] == "mine.RankOne" and is_text(command.config)
    with pytest.raises(UserError, match=r"--data\.root"):
        check_here(prepare("fit", ["--model", "mine.MyTexts", "--data.dataset", "jsonl", "--data.root", "gone.jsonl"]))


def test_the_rate_of_an_own_method_is_searched(run: Run, mine: object) -> None:
    planned = run("tune", *SMALL, "--model.adapter", "mine.RankOne", "--model.learning_rate", "0.1", "--dry-run")
    assert planned.code == 0 and "RankOne at learning_rate 0.1" in planned.out, planned.err


def test_files_load_what_is_registered(mine: Callable[[], Any], own: Callable[[], None]) -> None:
    model, again = (nn.Sequential(nn.Linear(6, 4)) for _ in range(2))
    again.load_state_dict(model.state_dict())
    inject(model, mine().RankOne(scale=3.0), ["0"])
    with torch.no_grad():
        model.get_submodule("0").delta.column.fill_(1)  # type: ignore[union-attr]
    save_adapter(model, "own")
    with pytest.raises(UserError, match=r"Add --import mine .* call randlora_pl.adapters.register\(RankOne\)"):
        load_adapter(again, "own")
    assert adapters.register(mine().RankOne) is mine().RankOne
    assert load_adapter(again, "own").adapter.options()["scale"] == 3
    assert torch.equal(again(torch.ones(1, 6)), model(torch.ones(1, 6)))
    own()
    Path("mine.py").write_text(MODULE.replace("scale: float = 1.0", "factor: float = 1.0"))
    adapters.register(mine().RankOne)
    with pytest.raises(UserError, match="RankOne has no option 'scale'"):
        load_adapter(again, "own")


def _installed(folder: Path, entries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the modules of a folder an installed package with entry points."""
    info = folder / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(folder)


def test_entry_points_are_imported_when_a_file_needs_them(
    mine: Callable[[], Any], own: Callable[[], None], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    inject(model, mine().RankOne(), ["0"])
    save_adapter(model, "own")
    own()
    _installed(tmp_path, "[randlora_pl.adapters]\nRankOne = mine:RankOne\n", monkeypatch)
    assert adapters.read_adapter("own").adapter.method() == "RankOne"


@pytest.mark.parametrize("typed", ["mine.MyTexts", "MyTexts"])
def test_tasks_of_entry_points_have_their_own_data(
    mine: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: str
) -> None:
    text = "from randlora_pl.language import CausalLMTask\nclass MyTexts(CausalLMTask): pass\n"
    Path("mine.py").write_text(text)
    _installed(tmp_path, "[randlora_pl.tasks]\nMyTexts = mine:MyTexts\n", monkeypatch)
    command = prepare("fit", ["--model", typed, "--data.dataset", "e2e", "--data.mask_prompt", "true"])
    task = task_of(str(command.flat()["model"]))
    assert task and task.__name__ == "MyTexts" and "CausalLMTask" in [each.__name__ for each in task.__mro__]


class Nowhere(LoRA):
    class Inner(LoRA):
        pass


class Changing(LoRA):
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", self.strength + 1)


class Holding(LoRA):
    place: Any = None


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda: type("Local", (LoRA,), {})(rank=1), "top level"),
        (lambda: Nowhere.Inner(rank=1), "top level"),
        (lambda: type("Main", (LoRA,), {"__module__": "__main__"})(rank=1), "the main program"),
        (lambda: Changing(strength=2.0, rank=1), "a different adapter when it is rebuilt"),
        (lambda: Holding(place=Path("x"), rank=1), "options that cannot be saved"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(
    adapter: Callable[[], Adapter], message: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    inject(model, adapter(), ["0"])
    with pytest.raises(UserError, match=message):
        save_adapter(model, tmp_path / "own")
    assert not list(tmp_path.iterdir())


def test_registered_names_are_free_and_classes_are_of_their_kind(own: object) -> None:
    taken: Any = type("lora", (LoRA,), {})
    with pytest.raises(UserError, match="has the name of a method of this program"):
        adapters.register(taken)
    with pytest.raises(UserError, match="is not a subclass of Objective"):
        tasks.register(taken)


def test_a_task_with_a_hook_of_lightning_is_refused_with_what_takes_its_place(own: object) -> None:
    for hook, place in (("training_step", "define sample_losses instead"), ("on_fit_end", "move it to a callback")):
        kind: Any = type("Hooked", (TextHeadTask,), {hook: lambda *_: None})
        for use in (tasks.register, find_task, lambda kind: AdaptationModule(kind("tiny"))):
            with pytest.raises(UserError, match=f"Hooked defines {hook}, .* never in a task: {place}"):
                use(path_of(kind) if use is find_task else kind)


def test_own_methods_take_the_rate_of_their_parent(own: object) -> None:
    assert default_learning_rate(Nowhere(rank=4), TOWERS) == default_learning_rate(LoRA(rank=4), TOWERS)
    alone: Any = type("Alone", (Adapter,), {"count": LoRA.count, "delta_weight": LoRA.delta_weight})
    with pytest.raises(UserError, match=r"Alone has no learning rate of its own. Set it: --model.learning_rate"):
        default_learning_rate(alone(), TOWERS)


@pytest.mark.parametrize(
    ("text", "typed", "message"),
    [
        ("", "mine.py", "Give mine for the file mine.py"),
        ("", "mine_gone", "the module mine_gone is neither in"),
        ("import mine_gone", "mine", "importing mine fails: ModuleNotFoundError: No module named 'mine_gone'"),
        ("x = 1\nraise ValueError('odd')", "mine", "ValueError: odd (MINE, line 2)"),
        ("def f(:", "mine", "SyntaxError"),
        ("raise SystemExit(3)", "mine", "importing mine fails: SystemExit: 3"),
    ],
)
def test_modules_that_cannot_be_imported(refused: Refused, own: object, text: str, typed: str, message: str) -> None:
    Path("mine.py").write_text(text)
    for words in (("adapters", "--import", typed), ("fit", "--model.adapter", f"{typed}.X")):
        assert message.replace("MINE", str(Path("mine.py").absolute())) in refused(*words) or typed == "mine.py"


def test_a_file_that_an_installed_package_hides(refused: Refused, own: object) -> None:
    Path("yaml.py").touch()
    assert "yaml.py is hidden by" in refused("adapters", "--import", "yaml")
