"""A step of micro-batches is the undivided batch, for every term of the loss of learned prompts."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from randlora_pl.adapters import LoRA, RandLoRA
from randlora_pl.data import ImageData
from randlora_pl.tasks import PromptTask, SelfRegulation
from tests.support.products import marked
from tests.tasks.small import trained

from .learners import BY_IMAGE, KINDS, WITH_IMAGES, flat, make_prompts

OPTIONS = {"optimizer": "sgd", "prompt_learning_rate": 0.05, "learning_rate": 0.05, "max_grad_norm": None}
DATA = {"steps": None, "epochs": 1, "min_batches_per_epoch": 1, "shots": 3, "sampling": "epochs"}  # 30 samples
OFTEN = ("maple + dept", "promptsrc + randlora", "cocoop")


def new(kind: str, **options: Any) -> PromptTask:
    adapters = {"coop + randlora": RandLoRA(rank=8), "two stages": LoRA(rank=2, alpha=8)}  # without dropout
    plain = {"adapter": adapters[kind]} if kind in adapters else {}
    return make_prompts(kind, **OPTIONS | plain | options)


@pytest.mark.parametrize(
    ("kind",),
    marked(
        zip([*KINDS, *BY_IMAGE, *WITH_IMAGES]), lambda row: row[0] in ("maple + dept", "promptsrc + randlora", "cocoop")
    ),
)
def test_accumulated_steps_are_undivided_steps(kind: str, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 images in a step, and 6 in the last, against micro-batches of 4; every tensor moves.

    PromptSRC's absolute values have a kink, where rounding decides the sign of a gradient: float64 hardly rounds.
    """
    kinks = "src" in kind
    tolerance, precision = (1e-5, "64-true") if kinks else (1e-3, "32-true")
    if kinks:  # Lightning converts the images of workers alone
        monkeypatch.setattr(ImageData, "_late", lambda *_: "nothing")
    whole, split = new(kind), new(kind)
    start: dict[str, Tensor] = {}
    keep = LambdaCallback(on_train_batch_start=lambda _, module, *rest: start.update(trained(module.objective) | start))
    fit(whole, DATA | {"batch_size": 12}, precision=precision, callbacks=[keep])
    fit(split, DATA | {"batch_size": 4}, accumulate_grad_batches=3, precision=precision)
    for name, before in start.items():
        moved = trained(whole)[name] - before
        assert moved.norm() > 0, name
        assert (trained(split)[name] - trained(whole)[name]).norm() < tolerance * moved.norm() + 1e-7, name


def test_gradient_scaling_reaches_every_term_once(fit: Any) -> None:
    """Those of DePT's second head and of PromptSRC."""

    def weights(scale: float | None, batch_size: int) -> Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scale else []
        task = new("maple + dept", regulation=SelfRegulation(templates=3))
        options = {"plugins": plugins, "accumulate_grad_batches": 12 // batch_size}
        fit(task, DATA | {"batch_size": batch_size}, **options)
        return flat(trained(task))

    exact, whole, split = weights(None, 12), weights(256.0, 12), weights(256.0, 4)
    rounding = (whole - exact).norm()
    assert 0 < (split - whole).norm() < 2 * rounding
    assert rounding < 0.05 * exact.norm()
