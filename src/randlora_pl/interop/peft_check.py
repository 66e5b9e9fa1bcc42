"""Whether PEFT, loading a file, gives the outputs that we give."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora_pl.adapters import unload
from randlora_pl.errors import UserError
from randlora_pl.interop.base_model import Base
from randlora_pl.interop.peft_files import TENSORS
from randlora_pl.models.building import first_line

TOLERANCE = 1e-5
"""Of the largest output, or of 1 where that is smaller."""


def installed() -> bool:
    """Whether PEFT is there to be asked."""
    return find_spec("peft") is not None


@torch.no_grad()
def difference(ours: nn.Module, base: Base, folder: Path, classifier: tuple[str, Tensor] | None = None) -> float:
    """The largest difference between our outputs and PEFT's; of the merged weights where no inputs are known.

    Args:
        ours: The base model with our adapter.
        base: The base model.
        folder: A PEFT adapter.
        classifier: Name and weight (classes, features) of a classifier without bias that PEFT's file has and our
            model has not.

    Raises:
        UserError: They differ by more than rounding: also in float64, where deep models leave more in float32.
    """
    from peft import PeftModel

    plain: Any = base.build()
    if classifier is not None:
        plain.reset_classifier(len(classifier[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs: Any = PeftModel.from_pretrained(plain.eval(), str(folder), torch_device="cpu").eval()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"PEFT does not load it ({first_line(error)})") from error
    _check_names(theirs, folder)
    ours.eval()
    merged = {}
    if base.outputs is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = {"ours": unload(ours).state_dict(), "theirs": theirs.merge_and_unload().state_dict()}

    def compare() -> tuple[float, float]:
        if base.outputs is None:
            pairs = [(merged["ours"][name], merged["theirs"][name]) for name in merged["ours"]]
        else:
            expected = base.outputs(ours)
            if classifier is not None:
                expected = expected @ classifier[1].to(expected.dtype).T
            pairs = [(expected, base.outputs(theirs.get_base_model()))]
        found = max((float((a - b).abs().max()) for a, b in pairs if a.is_floating_point() and a.numel()), default=0.0)
        return found, max(1.0, *(float(a.abs().max()) for a, _ in pairs if a.numel()))

    found, largest = first, _ = compare()
    if not found <= TOLERANCE * largest and base.outputs is not None:
        ours.double(), theirs.double()
        found, largest = compare()
    if not found <= TOLERANCE * largest:
        raise UserError(f"PEFT gives other outputs than we do, by up to {first:.1e}")
    return first


def _check_names(model: Any, folder: Path) -> None:
    """Complains if PEFT adapts more or fewer layers than the file has."""
    from peft import get_peft_model_state_dict

    shared = ("randlora_A", "randlora_B", "vera_A", "vera_B")  # PEFT up to 0.21 has them once more in every layer
    found, saved = (
        {name.removeprefix("base_model.model.") for name in names if not name.endswith(shared)}
        for names in (get_peft_model_state_dict(model, save_embedding_layers=False), load_file(folder / TENSORS))
    )
    if others := sorted(found ^ saved):
        raise UserError(f"PEFT would adapt other layers, {others[0].rpartition('.lora_')[0] or others[0]} among them")
