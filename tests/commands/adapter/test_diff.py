import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import LoRA, RandLoRA, read_adapter
from randlora_pl.interop.base_model import layer_updates
from randlora_pl.tasks import TextHeadTask
from tests.support.cli import Run
from tests.tasks.small import CLASSES, TEMPLATES, shake

pytestmark = pytest.mark.usefixtures("deep")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    def save(name: str, adapter: RandLoRA | LoRA, classes: list[str] = CLASSES, **options: object) -> str:
        task = TextHeadTask(adapter=adapter, **options)  # type: ignore[arg-type]
        task.set_classes(classes, TEMPLATES)
        task.configure_model()
        shake(task)
        task.save(tmp_path / name, {"step": len(name)})
        return name

    return save


def test_options_and_updates(run: Run, saved: Callable[..., str], tmp_path: Path) -> None:
    a, b = saved("a", RandLoRA(rank=8, seed=1)), saved("bb", LoRA(rank=2, alpha=4.0, seed=1), ["cat", "dog"])
    result = run("adapter", "diff", a, b)
    assert result.code == 0, result.err
    for text in ("A: RandLoRA", "B: LoRA", "option rank", "A: 8", "B: 2", "2: cat, dog", "training step", "cosine"):
        assert text in result.out, text
    found = json.loads(run("adapter", "diff", a, b, "--json").out)
    one, two = (layer_updates(read_adapter(tmp_path / name)) for name in (a, b))
    assert found["differences"]["method"] == ["RandLoRA", "LoRA"] and found["missing"] == []
    assert [row["layer"] for row in found["layers"]] == list(one)
    for row in found["layers"]:
        x, y = one[row["layer"]], two[row["layer"]]
        assert row["difference"] == pytest.approx(float((x.double() - y.double()).norm()), rel=1e-6)
        cosine = torch.cosine_similarity(x.double().flatten(), y.double().flatten(), 0)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-9)


def test_the_same_twice(run: Run, saved: Callable[..., str]) -> None:
    a = saved("a", LoRA(rank=2))
    out = run("adapter", "diff", a, a).out
    assert "are the same" in out and "the updates are the same, bit for bit" in out


def test_what_cannot_be_compared(run: Run, saved: Callable[..., str]) -> None:
    a, b = saved("a", LoRA(rank=2)), saved("b", LoRA(rank=2), pretrained="random")
    out = run("adapter", "diff", a, b).out
    assert "updates not compared: a and b were trained on different base models: " in out
    c, d = saved("c", LoRA(rank=2), targets=["fc1"]), saved("d", LoRA(rank=2), targets=["fc2"])
    assert "no layer of one has the name and shape" in run("adapter", "diff", c, d).out
    assert "12 layers of only one of them" in run("adapter", "diff", a, c).out


def test_bad_input(run: Run, refused: Callable[..., str], saved: Callable[..., str]) -> None:
    a = saved("a", LoRA(rank=2))
    assert "adapter folder" in refused("adapter", "diff", a, "nowhere")
    assert "required: ADAPTER" in refused("adapter", "diff", a)
