"""Verification that PEFT computes the same outputs from an exported file."""

import copy
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora_pl.adapters import merge_and_unload
from randlora_pl.interop.base_model import Base
from randlora_pl.interop.compare_outputs import LOST
from randlora_pl.interop.peft.files import TENSORS
from randlora_pl.utils.errors import UserError, first_line

TOLERANCE = 1e-5
"""Tolerance relative to the largest output, or to 1 if that is smaller; `LOST` limits the adapter's lost change."""


def installed() -> bool:
    """Return True if PEFT is installed."""
    return find_spec("peft") is not None


@dataclass(frozen=True)
class LogitsOnly:
    """Classifier in PEFT's file that our model does not have: weight (classes, features), bias (classes) or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits (b, classes)."""
        bias = None if self.bias is None else self.bias.to(features.dtype)
        return nn.functional.linear(features, self.weight.to(features.dtype), bias)


class Difference(NamedTuple):
    """Largest difference between our outputs and PEFT's; NaN if a value is not finite.

    ``change`` is the largest change that the adapter makes to the base model's outputs, ``largest`` the largest output,
    or 1, and ``exact`` the largest difference in float64, if float32 was not precise enough.
    """

    gap: float
    change: float
    largest: float
    exact: float | None = None

    @property
    def fits(self) -> bool:
        """True if the difference is rounding, and not a lost small update."""
        return self.gap <= TOLERANCE * self.largest and (self.gap <= LOST * self.change or not self.change)

    def summary(self) -> str:
        """Return text for the user, after a colon or inside a sentence."""
        if not self.change:
            return f"{self.gap:.1e}; the adapter changes nothing, its outputs equal the base model's"
        changes = f"where the adapter changes the base model's by {self.change:.1e}"
        if self.exact is None:
            return f"{self.gap:.1e}, {changes}"
        return (
            f"{self.exact:.1e} in float64, which counts, {changes}; {self.gap:.1e} in float32 is this model's rounding"
        )


@torch.no_grad()
def difference(ours: nn.Module, base: Base, folder: Path, classifier: LogitsOnly | None = None) -> Difference:
    """Return the largest difference between our outputs and PEFT's, or of merged weights if inputs are unknown.

    Neither model is changed; if PEFT's file has a classifier, the base model is of timm.

    Raises:
        UserError: The difference is more than rounding, also in float64 (deep models round more in float32).
    """
    theirs, ours = _theirs(base, folder, classifier), ours.eval()
    if base.image_size is None and not base.generates_text:
        plain = base.model.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = merge_and_unload(copy.deepcopy(ours)).state_dict(), theirs.merge_and_unload().state_dict()
        first = _furthest([(merged[0][name], merged[1][name], plain[name]) for name in merged[0]])
    else:
        first = _furthest(_outputs(ours, theirs, base.model, base, classifier))
        if not first.fits:
            models = copy.deepcopy(ours).double(), theirs.double(), base.copy().model.double()
            if (again := _furthest(_outputs(*models, base, classifier))).fits:
                return again._replace(gap=first.gap, exact=again.gap)
    if not first.fits:
        raise UserError(
            f"PEFT gives other outputs than we do, by up to {first.gap:.1e} (the adapter changes {first.change:.1e})"
        )
    return first


def _theirs(base: Base, folder: Path, classifier: LogitsOnly | None) -> Any:
    """Return the base model with PEFT's adapter.

    Raises:
        UserError: PEFT cannot load it, or adapts other layers.
    """
    from peft import PeftModel

    plain: Any = base.copy().model
    if classifier is not None:
        plain.reset_classifier(len(classifier.weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs: Any = PeftModel.from_pretrained(plain.eval(), str(folder), torch_device="cpu").eval()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"PEFT does not load it ({first_line(error)})") from error
        _check_names(theirs, folder)
    return theirs


Triple = tuple[Tensor, Tensor, Tensor]
"""Outputs of our model, PEFT's and the base model."""


def _outputs(ours: nn.Module, theirs: Any, plain: nn.Module, base: Base, classifier: LogitsOnly | None) -> list[Triple]:
    found = [base.outputs(model) or [] for model in (ours, theirs.get_base_model(), plain)]
    if classifier is not None:
        found[0], found[2] = ([classifier(features) for features in own] for own in (found[0], found[2]))
    return list(zip(*found, strict=True))


def _furthest(triples: list[Triple]) -> Difference:
    triples = [triple for triple in triples if triple[0].is_floating_point() and triple[0].numel()]
    if any(not (a.isfinite().all() and b.isfinite().all()) for a, b, _ in triples):
        return Difference(float("nan"), 1.0, 1.0)
    return Difference(
        max(float((a - b).abs().max()) for a, b, _ in triples),
        max(float((a - plain).abs().max()) for a, _, plain in triples),
        max(1.0, *(float(a.abs().max()) for a, _, _ in triples)),
    )


def _check_names(model: Any, folder: Path) -> None:
    """Check that PEFT adapts exactly the layers of the file."""
    from peft import get_peft_model_state_dict

    shared = ("randlora_A", "randlora_B", "vera_A", "vera_B")  # PEFT up to 0.21 repeats them in every layer
    found, saved = (
        {name.removeprefix("base_model.model.") for name in names if not name.endswith(shared)}
        for names in (get_peft_model_state_dict(model, save_embedding_layers=False), load_file(folder / TENSORS))
    )
    if others := sorted(found ^ saved):
        raise UserError(f"PEFT would adapt other layers, {others[0].rpartition('.lora_')[0] or others[0]} among them")
