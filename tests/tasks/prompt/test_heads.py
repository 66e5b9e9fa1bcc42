"""DePT's second head and PromptSRC's terms against their equations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from randlora_pl.adapters import LoRA
from randlora_pl.data.catalog import IMAGENET_TEMPLATES
from randlora_pl.prompts import CoOp, Fixed
from randlora_pl.tasks import DePT, PromptTask, SelfRegulation
from tests.support.products import in_one_item
from tests.tasks.small import CLASSES, batch, shake, trained

from .learners import make_prompts


def built(kind: str, **options: Any) -> PromptTask:
    """A task for four classes, moved away from its start, without a trainer."""
    task = make_prompts(kind, **options)
    task.set_classes(CLASSES, ["{}"])
    task.adapt()
    return task


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def test_the_second_head_by_its_equations() -> None:
    task = built("maple + dept")
    own = task.decoupled
    assert own is not None and sum(p.numel() for p in own.parameters()) == 4 * 128 + 4 * 129
    for affine in (own.image, own.text):  # the identity at first
        assert torch.equal(affine(torch.eye(128)), torch.eye(128))
    shake(task)
    data = batch([0, 1, 1, 3, 2])
    u, t = task._images(data["image"]), task._texts(task.model)
    probe = lambda v: v @ own.probe.weight.T + own.probe.bias  # noqa: E731
    z_sim = task.model.logit_scale.exp() * unit(u) @ unit(t).T
    z_lp, z_text = probe(own.image.scale * u + own.image.shift), probe(own.text.scale * t + own.text.shift)
    ce = lambda z: F.cross_entropy(z, data["label"], reduction="none")  # noqa: E731
    expected = 0.3 * ce(z_sim) + 0.7 * (ce(z_lp) + ce(z_text[data["label"]])) / 2
    torch.testing.assert_close(task.sample_losses(data)[0], expected)
    task.eval()
    torch.testing.assert_close(task.class_logits(data["image"]), 0.3 * z_sim + 0.7 * z_lp)
    plain = own.classifier(task.scale() * unit(t))
    torch.testing.assert_close(plain(u), 0.3 * z_sim + 0.7 * z_lp)
    logits = task.class_logits(data["image"])
    task.set_classes(CLASSES[2:0:-1], ["{}"])  # some of its own, by both heads
    torch.testing.assert_close(task.class_logits(data["image"]), logits[:, [2, 1]])
    told: list[int] = []
    pairs = [(data["image"], torch.tensor([logits[n].argmax() for n in range(5)]))]
    assert task.percent_among(CLASSES, pairs, told.append) == (100, 5) and told == [5]
    assert task.classnames == CLASSES[2:0:-1]
    task.set_classes(["one", "five", "nine"], ["{}"])  # others, by the similarities alone
    others = unit(task._texts(task.model))
    torch.testing.assert_close(task.class_logits(data["image"]), task.scale() * unit(u) @ others.T)


def test_without_weight_the_second_head_changes_nothing_and_with_all_of_it_nothing_else_counts(fit: Any) -> None:
    options = {"prompts": CoOp(length=2, words=None), "optimizer": "sgd"}
    plain, none = make_prompts("coop", **options), make_prompts("coop", head=DePT(weight=0), **options)
    for task in (plain, none):
        fit(task)
    assert all(torch.equal(value, trained(none)[name]) for name, value in trained(plain).items())
    images = batch([0, 1])["image"]
    assert torch.equal(plain.class_logits(images), none.class_logits(images))
    alone = built("coop", head=DePT(weight=1))
    own = alone.decoupled
    assert own is not None
    features = own.image(alone._images(images))
    torch.testing.assert_close(alone.class_logits(images), own.probe(features))


def first_template(**options: Any) -> PromptTask:
    """A task whose prompt is the teacher's only template."""
    return built(
        "clip-lora", prompts=Fixed(template=IMAGENET_TEMPLATES[0]), regulation=SelfRegulation(templates=1), **options
    )


def test_terms_of_a_model_that_is_its_teacher_are_zero() -> None:
    task, data = first_template(), batch([0, 1, 2])
    with_terms, _ = task.sample_losses(data)
    task.regulation = None
    torch.testing.assert_close(with_terms, task.sample_losses(data)[0], rtol=1e-5, atol=1e-5)
    assert task.teacher is not None and task.teacher.text_loss(task._texts(task.model)) < 1e-5


@in_one_item("factors", [(25.0, 0.0, 0.0), (0.0, 10.0, 0.0), (0.0, 0.0, 1.0), (2.0, 3.0, 4.0)])
def test_each_term_by_its_equation(factors: tuple[float, float, float]) -> None:
    """With a weight update, whose teacher is the model without it."""
    text, image, logits = factors
    regulation = SelfRegulation(text=text, image=image, logits=logits, templates=3)
    task = built("promptsrc", adapter=LoRA(rank=2, alpha=8), regulation=regulation)
    data = batch([0, 1, 2])
    with torch.no_grad():  # the update is zero at first
        sums = sum(
            task.model.encode_text(task.tokenizer([t.format(c) for c in CLASSES])) for t in IMAGENET_TEMPLATES[:3]
        )
        g_z, f_z = unit(sums), unit(task.model.encode_image(data["image"]))
    shake(task)
    (found, _), texts = task.sample_losses(data), task._texts(task.model)
    g_p, f_p = unit(texts), unit(task._images(data["image"]))
    s = task.model.logit_scale.exp()
    z, p = (s * f_z @ g_z.T).log_softmax(1), (s * f_p @ g_p.T).log_softmax(1)
    expected = F.cross_entropy(s * f_p @ g_p.T, data["label"], reduction="none")
    expected = (
        expected + factors[1] * (f_p - f_z).abs().mean(1) + factors[2] * (z.exp() * (z - p)).sum(1) / len(CLASSES)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert task.teacher is not None
    torch.testing.assert_close(
        task.teacher.text_loss(texts), factors[0] * (g_p - g_z).abs().mean(), rtol=1e-4, atol=1e-5
    )


@in_one_item("kind", ["cocoop", "maple + dept"])
def test_gradients_are_those_of_finite_differences(kind: str, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CoCoOp's network and DePT's second head, with the images of a batch, in float64."""
    task: Any = make_prompts(kind)
    fit(task, {"steps": 1})
    shake(task)
    task.double().train()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    data = batch([0, 1, 1, 3, 2])
    data |= {"image": data["image"].double(), "weight": data["weight"].double()}

    def loss() -> torch.Tensor:
        task.step_features = None
        value: torch.Tensor = (task.sample_losses(data)[0] * data["weight"]).sum()
        return value

    own = task.learned.network if kind == "cocoop" else task.decoupled
    parameters = dict(own.named_parameters())
    found = torch.autograd.grad(loss(), list(parameters.values()))
    generator, step = torch.Generator().manual_seed(3), 1e-6
    for (name, value), gradient in zip(parameters.items(), found, strict=True):
        way, start = torch.randn(value.shape, generator=generator).double(), value.detach().clone()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                value.copy_(start + sign * step * way)
                ends.append(float(loss()))
                value.copy_(start)
        assert gradient.abs().max() > 0, name
        assert float((gradient * way).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5), name
