from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from randlora_pl.adapters import LoRA, VeRA, read_adapter
from randlora_pl.tasks import TextHeadTask, load_task
from tests.support.cli import Run
from tests.tasks.small import CLASSES, TEMPLATES, images, shake

pytestmark = pytest.mark.usefixtures("deep")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Adapters of two methods, ranks and seeds on the shipped tiny CLIP."""
    folder = tmp_path_factory.mktemp("two")
    for name, adapter in (("a", LoRA(rank=2, alpha=4.0, seed=1)), ("b", VeRA(rank=8, alpha=8.0, seed=2))):
        task = TextHeadTask(adapter=adapter)
        task.set_classes(CLASSES if name == "a" else ["cat", "dog", "fox"], TEMPLATES)
        task.configure_model()
        shake(task)
        task.save(folder / name)
    return str(folder / "a"), str(folder / "b")


def effective(path: str) -> dict[str, torch.Tensor]:
    return load_task(path).model.state_dict()


def test_merged_sum_is_the_sum_by_hand(run: Run, two: tuple[str, str]) -> None:
    result = run("adapter", "add", *two, "--weights", "0.5", "-2", "--output", "sum.safetensors")
    assert result.code == 0, result.err
    assert "0.5 x" in result.out and "-2 x" in result.out and "(VeRA)" in result.out
    from randlora_pl.models import load_clip

    state, a, b = load_file("sum.safetensors"), effective(two[0]), effective(two[1])
    for name, plain in load_clip("tiny").model.state_dict().items():
        if name in a:
            by_hand = plain.double() + 0.5 * (a[name].double() - plain) - 2 * (b[name].double() - plain)
            torch.testing.assert_close(state[name].double(), by_hand, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(state[name], plain)


@pytest.mark.slow
def test_lora_sum_with_the_head_of_the_second(run: Run, two: tuple[str, str]) -> None:
    result = run("adapter", "add", *two, "--as", "lora", "--error", "0", "--head", "2", "--output", "S")
    assert result.code == 0, result.err
    assert "S: LoRA, " in result.out and "largest difference of outputs" in result.out
    task = load_task("S")
    assert task.classnames == ["cat", "dog", "fox"]
    assert read_adapter("S").metadata["made_from"]["weights"] == [1.0, 1.0]
    run("adapter", "add", *two, "--output", "S.safetensors", "--head", "2")
    state = load_file("S.safetensors")
    found = task.model.state_dict()
    for name, value in found.items():
        if name in state:
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert task.class_logits(images(2)).shape == (2, 3)


def test_bad_input(run: Run, refused: Callable[..., str], two: tuple[str, str], finished: Path, tmp_path: Path) -> None:
    base = ("adapter", "add", *two, "--output")
    assert "--weights" in refused(*base, "s.pt", "--weights", "1")
    assert "--weights is inf: give a finite number" in refused(*base, "s.pt", "--weights", "1", "inf")
    assert "--head" in refused(*base, "s.pt", "--head", "3")
    assert "--as" in refused(*base, "s.pt", "--rank", "3")
    assert "--error" in refused(*base, "s", "--as", "lora")
    assert "ends in" in refused(*base, "s")
    message = refused("adapter", "add", two[0], str(finished / "adapter"), "--output", "s.pt")
    assert "open_clip" in message and "tiny random" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    assert "exists" in refused(*base, "mine", "--as", "lora", "--rank", "2")
    assert "other files" in refused(*base, "mine", "--as", "lora", "--rank", "2", "--overwrite")
    assert "would replace" in refused(
        "adapter", "add", *two, "--output", two[0], "--as", "lora", "--rank", "2", "--overwrite"
    )
