"""A step of micro-batches is the undivided batch, for every term of the loss of learned prompts."""

from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from randlora_pl.adapters import LoRA, RandLoRA
from randlora_pl.tasks import PromptTask
from tests.support.products import in_one_item
from tests.tasks.small import trained

from .learners import BY_IMAGE, KINDS, WITH_IMAGES, flat, make_prompts

OPTIONS = {"optimizer": "sgd", "prompt_learning_rate": 0.05, "learning_rate": 0.05, "max_grad_norm": None}
DATA = {"steps": None, "epochs": 1, "min_batches_per_epoch": 1, "shots": 3, "sampling": "epochs"}  # 30 samples


def new(kind: str) -> PromptTask:
    adapters = {"coop + randlora": RandLoRA(rank=8), "two stages": LoRA(rank=2, alpha=8)}  # without dropout
    plain = {"adapter": adapters[kind]} if kind in adapters else {}
    return make_prompts(kind, **OPTIONS | plain)


@in_one_item("kind", [*KINDS, *BY_IMAGE, *WITH_IMAGES])
def test_accumulated_steps_are_undivided_steps(kind: str, fit: Any) -> None:
    """12 images in a step, and 6 in the last, against micro-batches of 4; every tensor moves.

    PromptSRC's absolute values have a kink, where rounding decides the sign of a gradient: float64 hardly rounds.
    """
    kinks = "src" in kind
    tolerance, precision = (1e-5, "64-true") if kinks else (1e-3, "32-true")
    data = DATA | {"device_transforms": not kinks}  # Lightning converts the images of workers alone
    whole, split, start = new(kind), new(kind), new(kind)
    fit(whole, data | {"batch_size": 12}, precision=precision)
    fit(split, data | {"batch_size": 4}, accumulate_grad_batches=3, precision=precision)
    fit(start, data, max_steps=0)
    for name, before in trained(start).items():
        moved = trained(whole)[name] - before
        assert moved.norm() > 0, name
        assert (trained(split)[name] - trained(whole)[name]).norm() < tolerance * moved.norm() + 1e-7, name


@in_one_item("kind", ["maple + dept", "promptsrc"])
def test_gradient_scaling_reaches_every_term_once(kind: str, fit: Any) -> None:
    def weights(scale: float | None, batch_size: int) -> Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scale else []
        task = new(kind)
        options = {"plugins": plugins, "accumulate_grad_batches": 12 // batch_size}
        fit(task, DATA | {"batch_size": batch_size}, **options)
        return flat(trained(task))

    exact, whole, split = weights(None, 12), weights(256.0, 12), weights(256.0, 4)
    rounding = (whole - exact).norm()
    assert 0 < (split - whole).norm() < 2 * rounding
    assert rounding < 0.05 * exact.norm()
