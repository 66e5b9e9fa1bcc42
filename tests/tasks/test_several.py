"""Several adapters as tasks: each predicts as it does alone, and those of one base model hold its weights once."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    FullFineTuning,
    LinearProbe,
    LoRA,
    RandLoRA,
    adapted_layers,
    inject,
    read_adapter,
    save_adapter,
)
from randlora_pl.tasks import Objective, load_task, load_tasks, weighted_task
from randlora_pl.tasks.restore import plain_task
from randlora_pl.tasks.task_set import TaskSet
from randlora_pl.utils.errors import UserError
from tests.support.products import marked

from .small import CLASSES, KINDS, TEMPLATES, built, images, make, shake

OTHERS = ["cat", "dog", "cow"]


def saved(
    path: Path,
    kind: str,
    classes: list[str] = CLASSES,
    templates: list[str] = TEMPLATES,
    resize: str = "",
    **options: Any,
) -> Path:
    """An adapter that is not at its start."""
    task = make(kind, **options)
    task.set_classes(classes, templates)
    task.adapt()
    shake(task)
    frame = {"frame": asdict(task.image_spec) | {"resize": resize}} if resize else {}
    return task.save(path, {"step": 3} | frame)


def logits_of(task: Objective) -> Tensor:
    with torch.no_grad():
        return task.class_logits(images(3, task.image_spec.size))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the base models that are loaded from now on."""
    seen: list[str] = []

    def counted(load: Callable[..., Any]) -> Callable[..., Any]:
        def call(name: str, *args: Any, **options: Any) -> Any:
            seen.append(name)
            return load(name, *args, **options)

        return call

    for home in {sys.modules[base.__module__] for kind in KINDS.values() for base in kind.__mro__}:
        for name in ("load_clip", "load_vit"):
            if hasattr(home, name):
                monkeypatch.setattr(home, name, counted(getattr(home, name)))
    return seen


def storages(task: Objective) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in task.model.named_parameters() if ".delta." not in name}


SETS: dict[str, list[dict[str, Any]]] = {
    "text heads": [
        {"kind": "text head"},
        {"kind": "text head", "adapter": LoRA(rank=2, alpha=8.0), "targets": ["attn"], "classes": OTHERS},
        {"kind": "text head", "method": "dora"},
    ],
    "linear heads": [
        {"kind": "linear head"},
        {"kind": "linear head", "adapter": RandLoRA(rank=8, qkv="split"), "classes": OTHERS},
        {"kind": "linear head", "adapter": LinearProbe()},
        {"kind": "linear head", "method": "full"},
    ],
    "heads of both kinds": [
        {"kind": "linear head", "method": "bitfit"},
        {"kind": "text head", "classes": OTHERS},
        {"kind": "linear head", "method": "vera", "classes": OTHERS},
    ],
    "both towers": [
        {"kind": "vision-language"},
        {"kind": "vision-language", "method": "lora", "classes": OTHERS, "caption": "{}!"},
        {"kind": "vision-language", "method": "full", "eval_prompts": "ensemble"},
        {"kind": "vision-language", "logit_scale": "raw", "adapter": RandLoRA(rank=8, seed=4)},
    ],
}


def test_every_kind_is_in_a_set() -> None:
    assert {member["kind"] for members in SETS.values() for member in members} == set(KINDS)


@pytest.mark.parametrize(("members",), marked(zip(SETS.values()), lambda row: len(row[0]) == 4), ids=SETS)
def test_each_task_predicts_as_alone_on_one_backbone(
    members: list[dict[str, Any]], tmp_path: Path, builds: list[str]
) -> None:
    folders = {str(place): saved(tmp_path / str(place), **options) for place, options in enumerate(members)}
    expected = {name: load_task(folder) for name, folder in folders.items()}
    builds.clear()
    tasks = load_tasks(folders)
    assert builds == ["tiny"] and list(tasks) == list(folders)
    assert len({id(task.model) for task in tasks.values()}) == 1
    trained = {name: set(dict(task.model.named_parameters())) for name, task in expected.items()}
    for order in ([*tasks], [*tasks][::-1]):
        for name in order:
            task = tasks[name]
            assert type(task) is type(expected[name])
            assert (task.classnames, task.templates) == (expected[name].classnames, TEMPLATES)
            assert torch.equal(logits_of(task), logits_of(expected[name]))
            assert set(dict(task.model.named_parameters())) == trained[name]
            assert not any(module.training for module in task.modules())
            assert all(layer.merged for layer in adapted_layers(task.model).values() if layer.delta is not None)
    whole = {
        name for name, task in tasks.items() if task.adapter.trains_base and not isinstance(task.adapter, LinearProbe)
    }
    pointers = [storages(task) for name, task in tasks.items() if name not in whole]
    assert all(other == pointers[0] for other in pointers)


@pytest.mark.parametrize(("members",), marked(zip(SETS.values()), lambda row: row[0] == SETS["both towers"]), ids=SETS)
def test_a_batch_has_the_probabilities_of_each_task_alone(members: list[dict[str, Any]], tmp_path: Path) -> None:
    files = {str(place): read_adapter(saved(tmp_path / str(place), **each)) for place, each in enumerate(members)}
    tasks = TaskSet(plain_task(files["0"]))
    tasks.first.eval()
    for name, file in files.items():
        tasks.load(name, plain_task(file))
    names = [*files, *reversed(files)]
    pictures = images(len(names), tasks.first.image_spec.size)
    own = {name: load_task(tmp_path / name) for name in files}
    for row, name, picture in zip(tasks.probabilities(pictures, names), names, pictures, strict=True):
        alone = own[name]
        with torch.inference_mode():
            torch.testing.assert_close(row, alone.predictions(alone.class_logits(picture[None]))[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_other_base_models_have_their_own_backbone(tmp_path: Path, builds: list[str]) -> None:
    folders = {
        "tower": saved(tmp_path / "tower", "text head"),
        "both": saved(tmp_path / "both", "vision-language"),
        "seed": saved(tmp_path / "seed", "text head", seed=1),  # other random weights
        "large": saved(tmp_path / "large", "linear head", name="test_vit.r160_in1k", img_size=64),
        "small": saved(tmp_path / "small", "linear head", name="test_vit.r160_in1k", img_size=48),
        "again": saved(tmp_path / "again.safetensors", "linear head", name="test_vit.r160_in1k", img_size=48),
    }
    expected = {name: logits_of(load_task(folder)) for name, folder in folders.items()}
    builds.clear()
    tasks = load_tasks(folders)
    assert builds == ["tiny"] * 3 + ["test_vit.r160_in1k"] * 2
    assert tasks["small"].model is tasks["again"].model is not tasks["large"].model
    for name, task in tasks.items():
        assert torch.equal(logits_of(task), expected[name])
    assert (tasks["large"].image_spec.size, tasks["again"].image_spec.size) == (64, 48)


# Weighted sums


@pytest.mark.parametrize("kind", [pytest.param("text head", marks=pytest.mark.full), "vision-language"])
def test_a_weighted_sum_is_that_of_the_weights(kind: str, tmp_path: Path) -> None:
    """The oracle adds the merged weights of the two to a plain model."""
    folders = {"a": saved(tmp_path / "a", kind), "b": saved(tmp_path / "b", kind, method="dora")}
    tasks = {name: load_task(folder) for name, folder in folders.items()}
    merged = {name: dict(task.model.named_parameters()) for name, task in tasks.items()}
    plain = built(kind, adapter=FullFineTuning())
    plain.load_head(tasks["a"].head_tensors())
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            moved = [weight * (merged[task][name] - parameter) for task, weight in (("a", 0.5), ("b", 0.75))]
            parameter.add_(moved[0] + moved[1])
    summed = weighted_task(load_tasks(folders), {"a": 0.5, "b": 0.75})
    torch.testing.assert_close(logits_of(summed), logits_of(plain.eval()), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits_of(summed), logits_of(tasks["a"]), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "text head", "classes": OTHERS}, "a has 4 classes .* b has 3 classes .* same classes"),
        ({"kind": "text head", "seed": 1}, "a and b have different base models or tasks"),
        ({"kind": "linear head"}, "a and b have different base models or tasks"),
        ({"kind": "text head", "templates": ["a drawn {}"]}, "a and b have different prompts, .*a drawn"),
        ({"kind": "text head", "resize": "squash"}, "a and b have different images, .* resize to 32 x 32"),
        ({"kind": "text head", "method": "full"}, "'b' .*FullFineTuning"),
    ],
)
def test_sums_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    tasks = load_tasks({"a": saved(tmp_path / "a", "text head"), "b": saved(tmp_path / "b", **options)})
    with pytest.raises(UserError, match=message):
        weighted_task(tasks, {"a": 0.5, "b": 0.5})


def test_a_sum_of_linear_heads_is_refused(tmp_path: Path) -> None:
    tasks = load_tasks({name: saved(tmp_path / name, "linear head") for name in ("a", "b")})
    with pytest.raises(UserError, match="features"):
        weighted_task(tasks, {"a": 0.5, "b": 0.5})


# What is refused


def test_a_bad_one_among_good_ones_is_named(tmp_path: Path) -> None:
    good = saved(tmp_path / "good", "text head")
    layer = nn.Sequential(nn.Linear(4, 4))
    inject(layer, LoRA(rank=2), ["0"])
    with pytest.raises(UserError, match="was not saved"):
        load_tasks({"good": good, "plain": save_adapter(layer, tmp_path / "plain")})
    with pytest.raises(UserError, match="nowhere"):
        load_tasks({"good": good, "bad": tmp_path / "nowhere"})
    with pytest.raises(UserError, match="trained"):
        load_tasks({"good": good}, seed=1)
