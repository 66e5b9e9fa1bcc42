"""RandAugment, MixUp and CutMix of torchvision, as functions of the seed and the position in the sample order.

RandAugment of an image depends on its own position. MixUp and CutMix blend each image of one micro-batch on one device
with its neighbor; the strength depends on the first position of the micro-batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from randlora_pl.utils import rng


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images beside the random crop and flip; disabled by default.

    Attributes:
        randaugment: Strength of RandAugment, 0 to 30; None disables it.
        mixup: Both parameters of the beta distribution of MixUp's fractions; None disables MixUp.
        cutmix: Both parameters for CutMix. With both, each micro-batch uses either with probability 1/2.
    """

    randaugment: int | None = None
    mixup: float | None = None
    cutmix: float | None = None

    def enabled(self) -> list[str]:
        """Return the enabled augmentations, one entry each."""
        pairs = (("RandAugment", self.randaugment), ("MixUp", self.mixup), ("CutMix", self.cutmix))
        return [f"{name} {value:g}" for name, value in pairs if value is not None]

    def changed(self, planes: Tensor, position: int, seed: int) -> Tensor:
        """Return an image, uint8 (1 or 3, height, width), after two random operations (RandAugment), if enabled."""
        if self.randaugment is None:
            return planes
        transform = v2.RandAugment(magnitude=self.randaugment, interpolation=InterpolationMode.BILINEAR)
        with rng.seeded(int(rng.words(seed, "randaugment", torch.tensor(position)))):
            after: Tensor = transform(planes)
        return after

    def mixing(self, positions: Tensor, weights: Tensor, seed: int, classes: int) -> dict[str, Any]:
        """Return the blending of a micro-batch, as the entry ``mix`` of its batch for `mixed`; {} without blending.

        Images of weight 0 (padding or unreadable) are not blended.
        """
        choices = [("mixup", self.mixup), ("cutmix", self.cutmix)]
        choices = [(kind, alpha) for kind, alpha in choices if alpha is not None]
        if not choices:
            return {}
        kind, alpha = choices[int(rng.integers(seed, "mix", positions[0], len(choices), part=1))]
        word = int(rng.words(seed, "mix", positions[0]))
        rows = torch.nonzero(weights > 0)[:, 0].tolist()
        return {"mix": {"kind": kind, "alpha": alpha, "seed": word, "classes": classes, "rows": rows}}


PLAIN = Augment()


def mixed(batch: dict[str, Any], mix: dict[str, Any]) -> dict[str, Tensor]:
    """Return the blended entries of a batch, on its device.

    Images keep their weights: with fractions s and 1 - s, weights u and v and labels y and z, the loss becomes
    s u CE(y) + (1 - s) v CE(z).

    Args:
        batch: ``image`` (b, 3, H, W) float32, ``label`` (b,) int64 and ``weight`` (b,) float32.
        mix: Result of `Augment.mixing`.

    Returns:
        ``image`` and ``weight``, and ``target`` (b, classes) float32: class probabilities that sum to 1.
    """
    images, weights = batch["image"].clone(), batch["weight"].clone()
    targets = F.one_hot(batch["label"], mix["classes"]).float()
    if mix["rows"]:
        rows = torch.tensor(mix["rows"], device=images.device)
        transform = (v2.MixUp if mix["kind"] == "mixup" else v2.CutMix)(alpha=mix["alpha"])
        with rng.seeded(mix["seed"]):
            images[rows], blended = transform(images[rows], targets[rows] * weights[rows, None])
        weights[rows] = blended.sum(1)
        targets[rows] = blended / weights[rows, None]
    return {"image": images, "weight": weights, "target": targets}
