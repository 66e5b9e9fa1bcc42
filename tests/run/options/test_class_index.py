import inspect
from pathlib import Path

import pytest

from randlora_pl import adapters, language, tasks
from randlora_pl.data import ImageData
from randlora_pl.run.options import class_index
from randlora_pl.run.options.class_index import read_classes, subclasses, trainer_options
from randlora_pl.run.options.validate import CALLBACK_GROUPS, data_class
from randlora_pl.run.options.validate import tasks as tasks_by_name


def test_options_read_from_the_source_are_those_of_the_class() -> None:
    for package, base, module in (
        ("adapters", "Adapter", adapters),
        ("tasks", "LightningModule", tasks),
        ("language", "AdaptationTask", language),
    ):
        found = subclasses(package, base)
        assert found
        for name, source in found.items():
            signature = inspect.signature(getattr(module, name))
            assert source.options.keys() == signature.parameters.keys(), name
    assert read_classes("data")["ImageData"].options.keys() == inspect.signature(ImageData).parameters.keys()


def test_every_method_is_found_and_every_option_explained() -> None:
    found = subclasses("adapters", "Adapter")
    assert set(found) == set(adapters.methods.__all__)
    groups = [read_classes("run/callbacks")[name] for name in CALLBACK_GROUPS.values()]
    groups += [read_classes("run/options")["RunOptions"], *map(data_class, tasks_by_name())]
    for source in [*found.values(), *tasks_by_name().values(), *groups]:
        assert source.summary
        assert all(option.help for option in source.options.values()), source.name


def test_options_of_a_base_in_another_room_have_its_help_and_the_defaults_of_the_subclass() -> None:
    decoder, classifier = (read_classes("language")[name] for name in ("CausalLMTask", "TextClassificationTask"))
    base = read_classes("tasks")["AdaptationTask"].options
    assert decoder.options["warmup_steps"] == base["warmup_steps"] and base["warmup_steps"].help
    assert (base["weight_decay"].default, decoder.options["weight_decay"].default) == ("0.1", "0.0")
    assert "warmup_steps" not in classifier.options and "warmup_fraction" in classifier.options


def test_help_and_default_belong_to_the_option() -> None:
    rank = read_classes("adapters")["RandLoRA"].options["rank"]
    assert rank.default == "6"
    assert rank.choices == "int | dict[str, int]"
    assert rank.help.startswith("Rank r of each basis")


def test_names_of_literals_are_spelled_out_also_imported_ones() -> None:
    options = read_classes("adapters")["RandLoRA"].options
    assert options["basis"].choices == "uniform | normal | binary | ternary | hadamard"
    assert options["num_bases"].choices == "int | ceil | floor+1 | dict[str, int]"
    assert read_classes("language")["CausalLMTask"].options["quantize"].choices == "4bit | 8bit | None"


def test_attributes_do_not_replace_the_explanation_of_an_argument() -> None:
    classnames = read_classes("data")["ImageData"].options["classnames"]
    assert classnames.help.startswith("File with class names")


def test_classes_of_subfolders_and_public_paths() -> None:
    classes = read_classes("data")
    assert (
        classes["HubImages"].module.startswith("randlora_pl.data.")
        and classes["ImageData"].module == "randlora_pl.data"
    )


def test_trainer_options_come_from_lightning() -> None:
    from lightning.pytorch import Trainer

    assert set(trainer_options()) == set(inspect.signature(Trainer).parameters)


FIELDS = """
from dataclasses import field
from randlora_pl.rooms.{import_} import Rank

Init = Literal["zero", "kaiming"]

class Base:
    kind: ClassVar[str] = "x"
    rank: Rank = 4
    '''Rank r. A number,
    or numbers by pattern.'''
    qkv: str = "packed"
    '''Packing.'''

class Child(Base):
    '''Child of the base.'''

    rank: Rank = 8
    '''Rank of the child.'''
    init: Init
    '''Start.'''
    parts: list[Base] = field(default_factory=lambda: [Base(rank=2)])
    names: list[str] = field(default_factory=list)
    qkv: str = field(init=False, default="split")
"""


def test_fields_are_options_with_the_text_below_as_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "randlora_pl" / "rooms"
    room.mkdir(parents=True)
    monkeypatch.setattr(class_index, "PACKAGE", room.parent)
    (room / "types.py").write_text("Count = Annotated[int, Positive]\nRank = Count | dict[str, Count]\n")
    (room / "made.py").write_text(FIELDS.format(import_="types"))
    found = read_classes("rooms")
    assert found["Base"].options["rank"].help == "Rank r. A number, or numbers by pattern."
    assert found["Base"].options["rank"].choices == "int | dict[str, int]"
    child = found["Child"]
    assert child.summary == "Child of the base."
    assert {name: (option.choices, option.default) for name, option in child.options.items()} == {
        "rank": ("int | dict[str, int]", "8"),
        "init": ("zero | kaiming", None),
        "parts": ("list[Base]", "[Base(rank=2)]"),
        "names": ("list[str]", "[]"),
    }
