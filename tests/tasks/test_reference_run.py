"""The anchor: vision-language training equals a slow loop that is written from the equations and the protocol.

The loop knows no Lightning, no adapter class, no unique captions, no optimizer of PyTorch. It shares
with the fast code only the images, the frozen weights and the random bases.
"""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from randlora_pl.adapters import RandLoRA
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.data import ImageData
from randlora_pl.models import load_clip
from randlora_pl.tasks import AdaptationModule, VisionLanguageTask

from .small import trained

Pairs = list[list[Tensor]]
RANK, ALPHA, RATE, DECAY, STEPS, BATCH = 16, 10.0, 1e-3, 0.1, 3, 16


class Batches(L.Callback):
    """The images and labels that were trained on."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, list[int]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append((batch["image"], batch["label"].tolist()))


def adapted_names(weights: dict[str, Tensor]) -> list[str]:
    """Packed q/k/v and both MLP matrices of every block of both towers."""
    return [name for name in weights if name.endswith(("attn.in_proj_weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))]


def delta(lam: Tensor, gam: Tensor, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Equation 4, one basis after another; ``b`` is (D, n, r), ``a`` (r, d)."""
    large, small = max(shape), min(shape)
    total = torch.zeros(large, small)
    for j in range(len(lam)):
        total = total + b[:large, j] @ torch.diag(lam[j]) @ a[:, :small] @ torch.diag(gam[j])
    total = ALPHA / RANK * total
    return total if shape[0] >= shape[1] else total.T


def loss_of(model: Any, weights: dict[str, Tensor], images: Tensor, labels: list[int], tokens: Tensor) -> Tensor:
    """Every image against one caption for every image; the target is the first of the same class (protocol 2.3)."""

    def encode(method: str, inputs: Tensor) -> Tensor:
        model.forward = getattr(model, method)
        return F.normalize(functional_call(model, weights, (inputs,)), dim=1)

    logits = weights["logit_scale"].exp() * encode("encode_image", images) @ encode("encode_text", tokens[labels]).T
    return F.cross_entropy(logits, torch.tensor([labels.index(label) for label in labels]))


def adamw(
    parameters: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], step: int, rate: float
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019, algorithm 2); ``step`` counts from 1."""
    for parameter, gradient, pair in zip(parameters, gradients, moments, strict=True):
        pair[0] = 0.9 * pair[0] + 0.1 * gradient
        pair[1] = 0.999 * pair[1] + 0.001 * gradient**2
        first, second = pair[0] / (1 - 0.9**step), pair[1] / (1 - 0.999**step)
        parameter.data = parameter * (1 - rate * DECAY) - rate * first / (second.sqrt() + 1e-8)


def reference_run(batches: list[tuple[Tensor, list[int]]], names: list[str], a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Lambda and gamma of every adapted layer after the training."""
    clip = load_clip("tiny", "random", seed=0)
    model: Any = clip.model.eval()
    tokens = clip.tokenizer([f"An image of {name}" for name in names])
    frozen = {name: value.detach() for name, value in model.named_parameters()}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in adapted_names(frozen):
        small = min(frozen[name].shape)
        count = math.ceil(small / RANK)
        factors[name] = (torch.full((count, RANK), 1 / max(count, RANK)), torch.zeros(count, small))
    parameters = [value.requires_grad_() for pair in factors.values() for value in pair]
    moments = [[torch.zeros_like(value), torch.zeros_like(value)] for value in parameters]
    for step, (images, labels) in enumerate(batches):
        updates = {name: delta(*pair, a, b, frozen[name].shape) for name, pair in factors.items()}
        weights = frozen | {name: frozen[name] + update for name, update in updates.items()}
        gradients = list(torch.autograd.grad(loss_of(model, weights, images, labels, tokens), parameters))
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        gradients = [gradient * min(1.0, 1.0 / norm) for gradient in gradients]
        rate = RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * step / len(batches))) / 2)
        adamw(parameters, gradients, moments, step + 1, rate)
    layers = {name.removesuffix(".weight").removesuffix(".in_proj_weight"): pair for name, pair in factors.items()}
    return {
        f"{layer}.delta.{part}s": value
        for layer, pair in layers.items()
        for part, value in zip(("lambda", "gamma"), pair, strict=True)
    }


def test_training_equals_a_slow_loop(digits: Callable[..., ImageData], trainer: Callable[..., L.Trainer]) -> None:
    """In whole batches, and in steps of two micro-batches."""
    expected: dict[str, Tensor] = {}
    for accumulate in (1, 2):
        task = VisionLanguageTask(name="tiny", pretrained="random", adapter=RandLoRA(rank=RANK, alpha=ALPHA))
        data = digits(steps=STEPS, batch_size=BATCH // accumulate, shots=8)
        trainer(callbacks=[batches := Batches()], accumulate_grad_batches=accumulate).fit(AdaptationModule(task), data)
        if not expected:
            assert [len(labels) for _, labels in batches.seen] == [BATCH] * STEPS
            assert all(len(set(labels)) < BATCH for _, labels in batches.seen)  # captions do occur more than once
            bases = next(module.bases for module in task.model.modules() if isinstance(module, RandLoRADelta))
            expected = reference_run(batches.seen, data.classnames, bases.A[0], bases.B)

        found = {name.removeprefix("backbone."): value for name, value in trained(task).items()}
        assert found.keys() == expected.keys()
        errors = torch.cat([(found[name] - expected[name]).detach().flatten().abs() for name in found])
        size = torch.cat([expected[name].detach().flatten() for name in found if name.endswith("gammas")])  # from zero
        assert (errors > 1e-5).float().mean() < 1e-4  # Adam magnifies the rounding of a gradient that is nearly zero
        assert errors.norm() < 5e-4 * size.norm()
