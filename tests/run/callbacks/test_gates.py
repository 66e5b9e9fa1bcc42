"""Gates by class: the means of the router's softmax, and the plot."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from randlora_pl.adapters import DeltaWeight, HydraLoRA
from randlora_pl.run.callbacks import Gates, gates_figure
from randlora_pl.run.callbacks.figures import pixels, sample_means
from randlora_pl.tasks import AdaptationModule, TextHeadTask
from tests.run.callbacks.conftest import Fit


def test_the_table_has_the_softmax_of_the_router_by_class(fit: Fit, tmp_path: Path) -> None:
    task = TextHeadTask("tiny", "random", adapter=HydraLoRA(rank=2, heads=2))
    gates = Gates()
    trainer, task, data = fit(gates, task=task)
    found = [(path, each) for path, each in task.model.named_modules() if isinstance(each, DeltaWeight) and each.heads]
    layers: dict[str, Any] = {path.removesuffix(".delta"): each for path, each in found}
    name = next(name for name in layers if name.endswith("c_fc"))
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.append((inputs[0].detach(), batch_labels[-1]))

    batch_labels: list[Tensor] = []
    evaluate = task.evaluate

    def labelled(batch: Any, stage: str) -> Any:
        batch_labels.append(batch["label"])
        return evaluate(batch, stage)

    task.evaluate = labelled  # type: ignore[method-assign]
    handle = task.model.get_submodule(name).register_forward_hook(keep)
    (metrics,) = trainer.test(AdaptationModule(task), data, verbose=False)
    handle.remove()
    assert all(delta.listener is None for delta in layers.values())
    per_class: dict[int, list[Tensor]] = {}
    for x, labels in seen:
        weights = (x.double() @ layers[name].router.double().T).softmax(-1).mean(1)
        for label, weight in zip(labels.tolist(), weights, strict=True):
            per_class.setdefault(label, []).append(weight)
    rows = list(csv.DictReader((tmp_path / "figures" / "gates.csv").open(newline="")))
    assert len({row["layer"] for row in rows}) == len(layers) == 6  # two blocks of three layers
    mine = {row["group"]: row for row in rows if row["layer"] == name}
    assert mine.keys() == {task.classnames[label] for label in per_class}
    for label, values in per_class.items():
        row = mine[task.classnames[label]]
        expected = torch.stack(values).mean(0)
        assert int(row["samples"]) == len(values)
        assert [float(row[f"head {k}"]) for k in (1, 2)] == pytest.approx(expected.tolist(), abs=1e-5)
        assert 0 < float(row["entropy"]) <= 1
    samples, entropies = (torch.tensor([float(row[key]) for row in rows]) for key in ("samples", "entropy"))
    assert metrics["test/gate_entropy"] == pytest.approx(float((samples * entropies).sum() / samples.sum()), abs=1e-5)
    assert np.asarray(Image.open(tmp_path / "figures" / "gates.png")).std() > 1


def test_other_methods_and_tests_before_the_training_have_none(fit: Fit, tmp_path: Path) -> None:
    trainer, task, data = fit(Gates())
    trainer.test(AdaptationModule(task), data, verbose=False)
    trainer, task, data = fit(Gates(), task=TextHeadTask("tiny", "random", adapter=HydraLoRA(rank=2)))
    module = AdaptationModule(task)
    module.test_name = "zeroshot"
    trainer.test(module, data, verbose=False)
    assert not (tmp_path / "figures").exists()


def test_means_of_every_layout() -> None:
    gates = torch.rand(4, 6, 3).softmax(-1)
    for shown in (gates, gates.transpose(0, 1), gates.view(8, 3, 3), gates.view(4, 2, 3, 3)):
        found = sample_means(shown, 4)
        assert found is not None and torch.allclose(found[0], gates.mean(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 4)
    for length in (6, 5):
        found = sample_means(gates[:, :length], 4, mask)
        assert found is not None and torch.allclose(found[0], gates[:, 2:length].mean(1))
    assert sample_means(gates[:, :1], 4, mask) is None is sample_means(gates[:3], 4, mask)  # a token, other samples
    assert sample_means(torch.rand(5, 7, 3), 4) is None
    even, sure = torch.full((2, 5, 3), 1 / 3), torch.eye(3)[None, [0, 1, 2, 0, 1]]
    for gates, entropy in ((even, 1.0), (sure, 0.0)):
        found = sample_means(gates, len(gates))
        assert found is not None and torch.allclose(found[1], torch.tensor(entropy), atol=1e-6)


def test_questions_are_grouped_by_their_dataset_and_many_layers_are_drawn() -> None:
    gates = Gates()
    items = [SimpleNamespace(task=name) for name in ("boolq", "piqa", "boolq")]
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(items=items))
    gates._groups = ["boolq", "piqa"]
    gates._sums = {"fc": torch.zeros(2, 4)}
    batch = {"index": torch.tensor([2, 1, 0]), "weight": torch.tensor([1.0, 1.0, 0.0])}
    batch["attention_mask"] = torch.ones(3, 5)
    gates.on_test_batch_start(trainer, None, batch, 0)  # type: ignore[arg-type]
    first = torch.rand(3, 5, 2).softmax(-1)
    for seen in (first, torch.rand(3, 1, 2)):  # the prompts, then a generated token
        gates._listen("fc", seen)
    gates.on_test_batch_end(trainer, None, {"texts": []}, batch, 0)
    assert torch.allclose(gates._sums["fc"][:, :2], first[:2].mean(1), atol=1e-6)
    assert gates._sums["fc"][:, 3].tolist() == [1, 1]

    means = torch.rand(30, 50, 4).softmax(-1)
    layers = [f"model.layers.{number}.mlp" for number in range(30)]
    image = pixels(gates_figure(means, layers, [f"class {number}" for number in range(50)], "title"))
    assert image.shape[1] > image.shape[0] > 200 and image.std() > 10
    assert pixels(gates_figure(means[:1, :1], ["fc"], ["all samples"])).std() > 1
