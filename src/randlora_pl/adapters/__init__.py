"""Adapters: RandLoRA and its baselines, for any PyTorch model.

Examples:
    >>> from randlora_pl.adapters import RandLoRA, inject, load_adapter, merge_and_unload, save_adapter
    >>> from randlora_pl.adapters import trainable_parameters
    >>> report = inject(model, RandLoRA(rank=6), trained=["head"])
    >>> optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3)
    >>> loss = torch.nn.functional.cross_entropy(model(images), labels)
    >>> loss.backward()
    >>> optimizer.step()
    >>> path = save_adapter(model, "adapter")  # small: the frozen weights and the random bases are not in it
    >>> plain = merge_and_unload(model)  # the model as it was, with new weights
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.adapters.adapter_file import AdapterFile
    from randlora_pl.adapters.adapter_set import AdapterSet
    from randlora_pl.adapters.base import Adapter, DeltaWeight
    from randlora_pl.adapters.injection import InjectionReport, inject
    from randlora_pl.adapters.methods import (
        OFT,
        PRANC,
        SVFT,
        AdaLoRA,
        AutoLoRA,
        BitFit,
        DoRA,
        Fira,
        Frozen,
        FullFineTuning,
        GaLore,
        HiRA,
        HydraLoRA,
        KRAdapter,
        LinearProbe,
        LoRA,
        LoRAXS,
        NoLA,
        PiSSA,
        RandLoRA,
        SHiRA,
        Together,
        VeRA,
        register,
    )
    from randlora_pl.adapters.methods.full import ProjectedAdamW
    from randlora_pl.adapters.methods.refine import refine
    from randlora_pl.adapters.operations import (
        adapted_layers,
        delta_weights,
        disabled,
        make_optimizer,
        merge,
        merge_and_unload,
        parameter_groups,
        set_train_mode,
        trainable_parameters,
        unmerge,
    )
    from randlora_pl.adapters.save_load import load_adapter, read_adapter, save_adapter

__getattr__, __dir__ = lazy_exports(__name__, __file__)
