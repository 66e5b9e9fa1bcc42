from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.sources import MOST_PIXELS
from randlora_pl.data.validate import read_templates
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item


@in_one_item(
    ("options", "message"),
    [
        ({"dataset": "digit"}, "Did you mean 'digits'"),
        ({"dataset": "folder"}, r"'folder' needs --data.root: --data.root FOLDER \(CLASS/IMAGE"),
        ({"dataset": "pairs", "root": "a.csv", "shots": 2}, "captions have none. Use --data.fraction"),
        ({"shots": 0}, "shots is 0. Set a whole number from 1"),
        ({"shots": 4, "fraction": 0.5}, "cannot be combined"),
        ({"fraction": 0.0}, "Set a number between 0 and 1"),
        ({"train_split": "ful"}, "Did you mean 'full'"),
        (
            {"split": "coop"},
            "--data.split coop: digits does not have this split. Remove the option",
        ),
        ({"dataset": "pairs", "root": "a.csv", "classes": "new"}, "captions have none. Remove it"),
        ({"steps": 5, "epochs": 5}, "--data.epochs 5 and --data.steps 5 cannot be combined"),
        ({"min_batches_per_epoch": -1}, "a whole number from 0"),
        ({"resize": "squish"}, "Did you mean 'squash'"),
        ({"resize": "pad"}, "unknown. Known: model, shortest, longest, squash"),
        ({"resize": "model:0.9"}, "unknown"),
        ({"resize": "squash:0"}, "between 0.05 and 20"),
        ({"resize": {"longest": None}}, "Set a text"),  # as YAML reads `longest:`
        ({"templates": '["a {}", 3]'}, "is not a list of texts"),
        ({"resize": "squash:nan"}, "between 0.05 and 20"),
        ({"resize": "squash:"}, "between 0.05 and 20"),
        ({"num_workers": 5000}, "--data.num_workers is 5000"),
        ({"dataset": "pairs", "root": "a.csv", "cutmix": 1.0}, "captions have none"),
        ({"dataset": "pairs", "root": "a.csv", "balance": "sampler"}, "captions have none"),
        ({"crop_scale": (0.0, 1.0)}, "0 < minimum <= maximum <= 1"),
        ({"crop_scale": (0.8, 0.5)}, "0 < minimum <= maximum <= 1"),
        ({"templates": "prompts.txt"}, r"prompts.txt does not exist \(--data.templates\)"),
        ({"templates": []}, "--data.templates is empty"),
        ({"dataset": "pairs", "root": "pairs.csv", "templates": ["a photo of {}"]}, "templates"),
        ({"templates": ["a photo"]}, "must have {} once"),
        ({"templates": ["a {} {}"]}, "must have {} once"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ImageData(**options)
    assert len(str(caught.value).splitlines()) <= 2


def test_default_size_limit_is_pillows() -> None:
    assert signature(ImageData.__init__).parameters["max_pixels"].default == MOST_PIXELS


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a {}.\n\n  a caf\u00e9 called {} \n", encoding="utf-8-sig")
    assert ImageData(templates=str(path)).templates == ["a photo of a {}.", "a caf\u00e9 called {}"]
    assert read_templates("a {}") == ["a {}"] and read_templates(None) is None
    assert read_templates(f"{'a long way ' * 100}{{}}") == [f"{'a long way ' * 100}{{}}"]  # longer than a file name
    path.write_text("a photo of a {}.\na photo\n")
    with pytest.raises(UserError, match=r"prompts.txt"):
        read_templates(str(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="empty"):
        read_templates(str(path))
    path.write_bytes(b"caf\xe9 {}")
    with pytest.raises(UserError, match="cannot be read"):
        read_templates(str(path))
