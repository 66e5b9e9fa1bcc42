"""Adapters: RandLoRA and its baselines, for any PyTorch model."""

from typing import TYPE_CHECKING

from randlora_pl.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.adapters.adapter_set import AdapterSet
    from randlora_pl.adapters.base import Adapter, DeltaWeight
    from randlora_pl.adapters.injection import InjectionReport, inject
    from randlora_pl.adapters.io.adapter_file import AdapterFile
    from randlora_pl.adapters.io.save_load import load_adapter, read_adapter, save_adapter
    from randlora_pl.adapters.methods.fixed_rank.dora import DoRA
    from randlora_pl.adapters.methods.fixed_rank.lora import LoRA
    from randlora_pl.adapters.methods.fixed_rank.nola import NoLA
    from randlora_pl.adapters.methods.fixed_rank.vera import VeRA
    from randlora_pl.adapters.methods.full_rank.randlora import RandLoRA
    from randlora_pl.adapters.methods.whole.full import BitFit, FullFineTuning, LinearProbe
    from randlora_pl.adapters.operations import (
        adapted_layers,
        delta_weights,
        disabled,
        merge,
        merge_and_unload,
        set_train_mode,
        trainable_parameters,
        unload,
        unmerge,
    )

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterSet",
    "BitFit",
    "DeltaWeight",
    "DoRA",
    "FullFineTuning",
    "InjectionReport",
    "LinearProbe",
    "LoRA",
    "NoLA",
    "RandLoRA",
    "VeRA",
    "adapted_layers",
    "delta_weights",
    "disabled",
    "inject",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "read_adapter",
    "save_adapter",
    "set_train_mode",
    "trainable_parameters",
    "unload",
    "unmerge",
]

__getattr__ = lazy_exports(__name__, __file__)
