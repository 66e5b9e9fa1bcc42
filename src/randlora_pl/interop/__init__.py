"""Exchange with other programs: merged weights, PEFT, the official code, plain LoRA, ONNX, hubs.

`randlora-pl adapter` does all of it on the command line; these functions are for scripts.

Examples:
    >>> from randlora_pl.adapters import inject, LoRA, save_adapter
    >>> from randlora_pl.interop import export_peft, import_peft
    >>> report = inject(model, LoRA(rank=4))
    >>> path = save_adapter(model, "adapter")
    >>> exported = export_peft("adapter", "peft")  # for PeftModel.from_pretrained
    >>> adapted = import_peft("peft", merge_and_unload(model))

    >>> from randlora_pl.interop import export_torch, load_program
    >>> program = load_program(Path("runs/one/adapter"))
    >>> file = export_torch(program, Path("classifier.pt2"))  # export_onnx(program, Path("classifier.onnx")), too
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.interop.adapted_model import AdaptedModel
    from randlora_pl.interop.external import import_official
    from randlora_pl.interop.onnx import export_onnx, export_torch, load_program
    from randlora_pl.interop.peft_export import export_peft
    from randlora_pl.interop.peft_import import import_peft

__getattr__, __dir__ = lazy_exports(__name__, __file__)
