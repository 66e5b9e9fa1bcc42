"""Modules trained completely beside an adapter, as PEFT's ``modules_to_save``."""

from collections.abc import Sequence

from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile
from randlora_pl.interop.peft.tensors import Part
from randlora_pl.utils.errors import UserError


def modules_to_save(
    file: AdapterFile, parts: Sequence[Part], model: nn.Module | None
) -> tuple[list[str], dict[str, Tensor]]:
    """Return the modules and all of their tensors by name, as PEFT stores them.

    Args:
        file: Adapter.
        parts: Adapted weights of the adapter.
        model: Base model, for the other tensors of modules that were trained partially.

    Raises:
        UserError: PEFT cannot represent a tensor.
    """
    adapted = {part.path for part in parts}
    own = {
        name: tensor
        for name, tensor in file.tensors.items()
        if not any(name.startswith(f"{path}.delta.") for path in adapted)
    }
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in own))
    for module in modules:
        if not module or module in adapted:
            raise UserError(f"{next(n for n in own if n.rpartition('.')[0] == module)} trained beside its updates")
    if model is not None:
        for path, _ in model.named_modules():
            if path not in modules and (other := next((each for each in modules if path.endswith(each)), None)):
                raise UserError(f"it trained the module {other}, and PEFT takes that name for {path} as well")
        whole = {
            f"{path}.{key}": value for path in modules for key, value in model.get_submodule(path).state_dict().items()
        }
        own = whole | own
    return modules, own
