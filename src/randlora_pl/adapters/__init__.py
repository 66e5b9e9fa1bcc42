"""Adapters: the mathematics of RandLoRA and its baselines, and their place in any PyTorch model."""

from randlora_pl.adapters.base import Adapter, DeltaWeight
from randlora_pl.adapters.control import (
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
from randlora_pl.adapters.dora import DoRA
from randlora_pl.adapters.files import AdapterFile, load_adapter, read_adapter, save_adapter
from randlora_pl.adapters.inject import InjectionReport, inject
from randlora_pl.adapters.lora import LoRA
from randlora_pl.adapters.nola import NoLA
from randlora_pl.adapters.randlora import RandLoRA
from randlora_pl.adapters.several import AdapterSet
from randlora_pl.adapters.vera import VeRA
from randlora_pl.adapters.whole import BitFit, FullFineTuning, LinearProbe

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
