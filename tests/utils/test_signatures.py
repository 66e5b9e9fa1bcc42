"""Options by other names, and values of another kind."""

import pytest

from randlora_pl.adapters import LoRA
from randlora_pl.data import ImageData
from randlora_pl.tasks import LinearHeadTask
from randlora_pl.utils.errors import UserError


@pytest.mark.parametrize(
    ("kind", "option", "meant"),
    [
        (LoRA, "r", "rank"),
        (LoRA, "lora_alpha", "alpha"),
        (LinearHeadTask, "lr", "learning_rate"),
        (ImageData, "step", "steps"),
    ],
)
def test_an_unknown_option_names_its_class_and_what_was_meant(kind: type, option: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no option '{option}'. Did you mean '{meant}'\?"):
        kind(**{option: 1})
    with pytest.raises(TypeError, match="xyzzy"):
        kind(xyzzy=1)


def test_a_name_is_no_adapter_of_a_task() -> None:
    with pytest.raises(UserError, match=r"adapter is .* Set an object of Adapter"):
        LinearHeadTask(name="tiny", adapter="RandLoRA")
