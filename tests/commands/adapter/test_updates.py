import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from randlora_pl.adapters import LoRA, RandLoRA, VeRA, read_adapter
from randlora_pl.interop.base_model import layer_updates
from randlora_pl.tasks import TextHeadTask, load_task
from tests.support.cli import Refused, Run
from tests.tasks.small import CLASSES, TEMPLATES, shake

pytestmark = pytest.mark.usefixtures("deep")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Adapters of two methods, ranks and seeds on the shipped tiny CLIP."""
    folder = tmp_path_factory.mktemp("two")
    for name, adapter in (("a", LoRA(rank=2, alpha=4.0, seed=1)), ("b", VeRA(rank=8, alpha=8.0, seed=2))):
        task = TextHeadTask(adapter=adapter)
        task.set_classes(CLASSES if name == "a" else ["cat", "dog", "fox"], TEMPLATES)
        task.adapt()
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
    result = run("adapter", "add", *two, "--as", "lora", "--error", "0", "--head", "2", "--output", "S")
    assert "S: LoRA, " in result.out and "largest difference of outputs" in result.out, result.err
    assert load_task("S").classnames == ["cat", "dog", "fox"]
    assert read_adapter("S").metadata["made_from"]["weights"] == [1.0, 1.0]


def test_bad_input(run: Run, refused: Refused, two: tuple[str, str], finished: Path, tmp_path: Path) -> None:
    base = ("adapter", "add", *two, "--output")
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
    assert "more than an adapter" in refused(*base, "mine", "--as", "lora", "--rank", "2", "--overwrite")
    assert "would replace" in refused(*base, two[0], "--as", "lora", "--rank", "2", "--overwrite")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    def save(name: str, adapter: RandLoRA | LoRA, classes: list[str] = CLASSES, **options: object) -> str:
        task = TextHeadTask(adapter=adapter, **options)  # type: ignore[arg-type]
        task.set_classes(classes, TEMPLATES)
        task.adapt()
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


def test_the_same_twice_and_nothing(run: Run, refused: Refused, saved: Callable[..., str]) -> None:
    a = saved("a", LoRA(rank=2))
    out = run("adapter", "diff", a, a).out
    assert "are the same" in out and "the updates are the same, bit for bit" in out
    assert "adapter folder" in refused("adapter", "diff", a, "nowhere")


def test_what_cannot_be_compared(run: Run, saved: Callable[..., str]) -> None:
    a, b = saved("a", LoRA(rank=2)), saved("b", LoRA(rank=2), pretrained="random")
    out = run("adapter", "diff", a, b).out
    assert "updates not compared: a and b were trained on different base models: " in out
    c, d = saved("c", LoRA(rank=2), targets=["fc1"]), saved("d", LoRA(rank=2), targets=["fc2"])
    assert "no layer of one has the name and shape" in run("adapter", "diff", c, d).out
    assert "12 layers of only one of them" in run("adapter", "diff", a, c).out
