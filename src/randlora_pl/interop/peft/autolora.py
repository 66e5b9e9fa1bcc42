"""AutoLoRA as the method that it selects from, with the shares of the components multiplied into B or lambda."""

from dataclasses import replace

from randlora_pl.adapters import AdapterFile, AutoLoRA
from randlora_pl.interop.peft.tensors import Part


def selected_of(file: AdapterFile, parts: list[Part]) -> AdapterFile:
    """Return an AutoLoRA as the LoRA, or with ``select: bases`` the RandLoRA, with the same update."""
    adapter, tensors = file.adapter, dict(file.tensors)
    assert isinstance(adapter, AutoLoRA)
    for part in parts:
        prefix = f"{part.path}.delta.{part.block}." if part.block else f"{part.path}.delta."
        shares = tensors.pop(f"{prefix}v").double().softmax(0)
        name = f"{prefix}B" if adapter.select == "ranks" else f"{prefix}lambdas"
        scaled = tensors[name].double() * (shares if adapter.select == "ranks" else shares[:, None])
        tensors[name] = scaled.float()
    return replace(file, adapter=adapter.selected, tensors=tensors)
