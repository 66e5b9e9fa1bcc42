"""Learned prompts are served with the probabilities that ``predict`` writes."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.commands.main import main
from randlora_pl.prompts import CoCoOp, CoOp, MaPLe
from randlora_pl.serving import ServerOptions, app
from randlora_pl.serving.uploads import Upload
from randlora_pl.tasks import DePT, PromptTask
from tests.support.products import in_one_item
from tests.tasks.small import shake

NAMES = ["cat", "dog", "tree"]


@in_one_item(
    "options",
    [
        {"prompts": CoOp(length=2, words=None)},
        {"prompts": MaPLe(depth=2), "head": DePT()},
        {"prompts": CoCoOp(length=2, words=None)},
    ],
)
def test_a_server_gives_the_probabilities_of_predict(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = PromptTask("tiny", **options)
    task.set_classes(NAMES, [])
    task.configure_model()
    shake(task)
    adapter, folder = task.save(tmp_path / "adapter"), tmp_path / "images"
    folder.mkdir()
    contents = {}
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        contents[f"{number}.png"] = (folder / f"{number}.png").read_bytes()
    table = tmp_path / "table.csv"
    words = ["--images", str(folder), "--device", "cpu", "--top-k", "3", "--output", str(table)]
    assert main(["predict", "--adapter", str(adapter), *words]) == 0
    rows = {Path(row[0]).name: row[1:] for row in csv.reader(io.StringIO(table.read_text()))}

    monkeypatch.setattr(app, "trust_the_limit", lambda: None)  # of the worker's process
    server = app.ClassifierAPI(ServerOptions(adapter=adapter, batch_size=4, batch_timeout=0.0, workers=64), 10**6)
    server._build("cpu")
    answers = server.predict([Upload(content, 32 * 40, 3) for content in contents.values()])
    assert torch.get_num_threads() == 1
    seen = set()
    for name, answer in zip(contents, answers, strict=True):
        assert answer.status_code == 200
        found = {each["name"]: each["probability"] for each in json.loads(bytes(answer.body))["classes"]}
        expected = dict(zip(rows[name][::2], map(float, rows[name][1::2]), strict=True))
        assert found.keys() == set(NAMES) and found == pytest.approx(expected, abs=2e-6)
        seen.add(tuple(sorted(found.items())))
    assert len(seen) == 3
