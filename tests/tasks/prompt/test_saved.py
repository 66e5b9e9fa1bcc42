"""Files of learned prompts: the same logits, other classes, and one line for every damage."""

import json
import shutil
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import read_adapter
from randlora_pl.prompts import CoOp
from randlora_pl.run.callbacks.summary import model_results
from randlora_pl.tasks import PromptTask, load_task, load_tasks
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item, marked
from tests.tasks.prompt.learners import KINDS, make_prompts
from tests.tasks.small import images, shake

NAMES = ["cat", "dog", "tree"]


def built(kind: str, **options: Any) -> PromptTask:
    task = make_prompts(kind, **options)
    task.set_classes(NAMES, [])
    task.adapt()
    shake(task)
    return task.eval()


def logits(task: PromptTask) -> Tensor:
    with torch.no_grad():
        return task.class_logits(images(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder of MaPLe with DePT."""
    return built("maple + dept").save(tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] not in ("coop", "clip-lora", "promptsrc")))
def test_a_saved_task_gives_the_same_logits_and_names_other_classes(kind: str, tmp_path: Path) -> None:
    task = built(kind)
    restored = load_task(task.save(tmp_path / "adapter"))
    assert isinstance(restored, PromptTask)
    task.prepare_evaluation()
    assert torch.equal(logits(restored), logits(task))  # a test of the file repeats the test of the run
    assert restored.prompts.describe() == task.prompts.describe()
    assert torch.equal(logits(load_tasks({"one": tmp_path / "adapter"})["one"]), logits(restored))  # type: ignore[arg-type]
    features = restored.features_of(["a", "b"])
    assert restored.classnames == NAMES and len(features) == 2
    restored.set_classes(["a", "b"], [])
    torch.testing.assert_close(restored.class_features(), features)
    assert logits(restored).shape == (2, 2)
    restored.set_classes(NAMES, [])
    torch.testing.assert_close(logits(restored), logits(task), rtol=1e-4, atol=1e-4)


def test_a_new_task_on_other_classes_takes_a_saved_file(saved: Path) -> None:
    file = read_adapter(saved)
    task = make_prompts("maple + dept")
    task.saved = file
    task.set_classes(["a", "b"], [])  # of the data
    task.adapt()
    task.load_head(file.extra)
    assert task.own_classes == NAMES and task.classnames == ["a", "b"]
    assert logits(task.eval()).shape == (2, 2)


def test_a_second_head_is_saved_and_trained_for_its_own_classes(tmp_path: Path) -> None:
    for kind in ("maple + dept", "two stages"):
        task = built(kind)
        task.set_classes(["a", "b"], [])
        with pytest.raises(UserError, match=r"the second head is for the classes \['cat', 'dog', 'tree'\]..., not for"):
            task.save(tmp_path / "adapter")
    other = built("coop")
    other.set_classes(["a", "b"], [])
    assert len(load_task(other.save(tmp_path / "adapter")).class_features()) == 2


def test_prompts_of_each_class_name_no_others(tmp_path: Path) -> None:
    task = built("coop", prompts=CoOp(length=2, words=None, class_specific=True))
    restored = load_task(task.save(tmp_path / "adapter"))
    for use in (lambda: restored.set_classes(["a", "b", "c"], []), lambda: restored.features_of(["a", "b", "c"])):
        with pytest.raises(UserError, match="class-specific prompts were learned for"):
            use()


def test_results_name_prompts_and_count_all_that_trains() -> None:
    task = built("maple + dept")
    found = model_results(task)
    assert found["prompts/method"] == "MaPLe" and found["head/weight"] == 0.7 and found["method"] == "Frozen"
    assert found["adapter_parameters"] == 0 and found["prompt_parameters"] > 0
    assert found["trainable_parameters"] == sum(task.parameter_parts().values())


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the description of a folder, and remove its checksums."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["sha256"]
    change(config["metadata"])
    file.write_text(json.dumps(config))


def maple(**options: Any) -> dict[str, Any]:
    return {"method": "MaPLe", "options": {"length": 2, "depth": 2} | options}


@in_one_item(
    ("name", "value", "message"),
    [
        ("prompts", 3, "3 describes nothing that this version has"),
        ("prompts", {"method": ["MaPLe"], "options": {}}, "is unknown. This version has CoCoOp, CoOp, DeepPrompts"),
        ("prompts", {"method": "MaPLee", "options": {}}, "method 'MaPLee' is unknown"),
        ("prompts", maple(lenght=2), "MaPLe does not accept these options (MaPLe has no option 'lenght'."),
        ("prompts", maple(depth=1), "the head does not fit"),
        ("prompts", {"method": "CoOp", "options": {"length": 2, "words": None}}, "the head does not fit"),
        ("head", {"method": "CoOp", "options": {}}, "method 'CoOp' is unknown. This version has DePT, TipAdapter."),
        ("head", {"method": "DePT", "options": {"weight": 7}}, "DePT: weight is 7"),
        ("head", None, "the head does not fit"),
        ("regulation", {"method": "SelfRegulation", "options": {"templates": 0}}, "SelfRegulation: templates is 0"),
        ("seed", 5, "does not fit this model: it was trained on different weights (open_clip tiny random "),
    ],
)
def test_damaged_descriptions_are_one_line(saved: Path, name: str, value: Any, message: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "adapter"))
    changed(copy, lambda metadata: metadata["arguments"].update({name: value}))
    with pytest.raises(UserError) as refused:
        load_task(copy)
    found = str(refused.value)
    assert message in found and "\n" not in found and len(found) < 500, found


def test_other_classes_in_the_description_do_not_fit(folder: Path) -> None:
    changed(folder, lambda metadata: metadata.update(classnames=[*NAMES, "bird"]))
    with pytest.raises(UserError, match="the head does not fit"):
        load_task(folder)


class OneRate(PromptTask):
    name: str = field(default="tiny", kw_only=False)
    head_learning_rate: float | None = field(init=False, default=None)


def test_a_subclass_fixes_the_rate_of_the_head() -> None:
    assert "head_learning_rate" not in OneRate().constructor()
