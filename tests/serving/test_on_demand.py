"""Adapters of a folder: which names there are, what is loaded and unloaded, and that each answers as it does alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import HTTPException

from randlora_pl.adapters import FullFineTuning
from randlora_pl.data.unlabelled import read_image
from randlora_pl.serving import ServerOptions, app, on_demand
from randlora_pl.serving.on_demand import find_files, list_names
from randlora_pl.serving.uploads import Upload, adapter_name
from randlora_pl.tasks import load_task
from tests.serving import pictures
from tests.serving.folder import BAD_NAMES, CLASSES, REFUSED, changed, damage, fill, write

PICTURES = [pictures.encode(pictures.photo(40 + 9 * turn, 50), "PNG") for turn in range(3)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return fill(tmp_path_factory.mktemp("served") / "adapters")


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(filled, tmp_path / "adapters", symlinks=True))


Build = Callable[..., app.ClassifierAPI]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    def make(folder: Path, base: str = "pets", **options: Any) -> app.ClassifierAPI:
        monkeypatch.setattr(app, "trust_the_limit", lambda: None)  # of the worker's process
        file = on_demand.read_adapter(folder / base)
        api = app.ClassifierAPI(ServerOptions(adapters=folder, workers=64, **options), 10**6, file)
        api._build("cpu")
        return api

    return make


def ask(api: app.ClassifierAPI, *names: str, picture: int = 0) -> list[tuple[int, dict[str, Any]]]:
    """Status and content of the answers to a batch, one for each name."""
    answers = api.predict([Upload(PICTURES[picture], 2000, 9, name) for name in names])
    return [(answer.status_code, json.loads(bytes(answer.body))) for answer in answers]


def alone(path: Path, picture: int = 0) -> dict[str, float]:
    """Probability of each class by the adapter in a model of its own, which a later copy of its files shares."""
    content = b"".join(file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path]))
    if (content, picture) not in _alone:
        _alone[content, picture] = _probabilities(path, picture)
    return _alone[content, picture]


_alone: dict[tuple[bytes, int], dict[str, float]] = {}


def _probabilities(path: Path, picture: int) -> dict[str, float]:
    task = load_task(path)
    with torch.inference_mode():
        row = task.predictions(task.class_logits(read_image(PICTURES[picture], "a", task.frame)))[0]
    return dict(zip(task.classnames, row.tolist(), strict=True))


def probabilities(answer: tuple[int, dict[str, Any]]) -> dict[str, float]:
    assert answer[0] == 200, answer
    return {entry["name"]: entry["probability"] for entry in answer[1]["classes"]}


def check(api: app.ClassifierAPI, folder: Path, *names: str) -> None:
    for name, answer in zip(names, ask(api, *names), strict=True):
        path = find_files(folder, name)
        assert path is not None and probabilities(answer) == pytest.approx(alone(path.path), abs=1e-5)


def test_names_are_of_entries_of_the_folder_alone(filled: Path) -> None:
    assert list_names(filled) == sorted([*CLASSES, "damaged", "tower", "other", "texts", "plain"])
    assert list_names(filled, 2) == list_names(filled)[:2] and list_names(filled / "gone") == []
    assert not any(find_files(filled, name) for name in [*BAD_NAMES, "link", "inner", "empty", "none", ""])


def test_a_request_gives_one_name_or_none(filled: Path) -> None:
    given: tuple[object, ...]
    for given in (("pets",), ("", "pets"), ("pets", "pets")):
        assert adapter_name(filled, given) == "pets"
    assert adapter_name(None, [""]) == ""
    wrong: list[tuple[Path | None, tuple[object, ...], int, str]] = [
        (filled, (), 400, "birds, cars, "),
        (filled, ("pets", "cars"), 400, "one of the adapters"),
        (filled, (b"file",), 400, "one of the adapters"),
        (None, ("pets",), 400, "leave adapter out"),
        *((filled, (name,), 404, "not a name") for name in BAD_NAMES),
    ]
    for folder, given, status, part in wrong:
        with pytest.raises(HTTPException, match=part) as refused:
            adapter_name(folder, given)
        assert refused.value.status_code == status and len(refused.value.detail) < 200


def test_samples_of_a_batch_have_their_own_adapters(
    filled: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = build(filled)
    assert api.shelf is not None
    passes: list[int] = []
    api.shelf.tasks.adapters.model.visual.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[union-attr]
    names = ["pets", "birds", "cars", "pets", *REFUSED]
    answers = ask(api, *names)
    for name, answer in zip(names, answers, strict=True):
        if name in REFUSED:
            status, part = REFUSED[name]
            assert answer[0] == status and part in answer[1]["detail"] and len(answer[1]["detail"]) < 300, answer
            assert str(filled.parent) not in answer[1]["detail"]
        else:
            path = find_files(filled, name)
            assert path is not None and probabilities(answer) == pytest.approx(alone(path.path), abs=1e-5), name
    passes.clear()
    assert ask(api, *names) == answers
    assert len(passes) == 1  # of all four samples


def test_refused_files_are_read_once(folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    api, read = build(folder), []
    monkeypatch.setattr(on_demand, "_copied", lambda files, to: read.append(files) or copied(files, to))
    for _ in range(3):
        assert {status for status, _ in ask(api, "damaged", "other", "damaged")} == {422}
    assert len(read) == 2
    shutil.rmtree(folder / "damaged")
    assert ask(api, "damaged")[0][0] == 404
    shutil.copytree(folder / "pets", folder / "damaged")
    check(api, folder, "damaged")


copied = on_demand._copied


def test_what_would_stop_a_worker_for_minutes_is_refused(folder: Path, build: Build) -> None:
    metadata = json.loads((folder / "pets" / "adapter_config.json").read_text())["metadata"]
    changed(folder / "pets", folder / "noted", metadata=metadata | {"note": "x" * 5_000_000})
    many = {"classnames": [str(n) for n in range(40_000)], "templates": ["a {}", "b {}", "c {}"]}
    ensemble = {"arguments": metadata["arguments"] | {"eval_prompts": "ensemble", "caption": None}}
    changed(folder / "pets", folder / "wordy", metadata=metadata | many | ensemble)
    for file in (folder / "pets" / "adapter.safetensors", folder / "birds.safetensors"):
        file.write_bytes((5_000_000).to_bytes(8, "little") + file.read_bytes()[8:] + bytes(5_000_000))
    for (status, answer), part in zip(
        ask(build(folder, base="cars"), "noted", "wordy", "pets", "birds"),
        ("config or a header has 5,", "120,000 texts", "header has 5,000,000 bytes", "header has 5,000,000 bytes"),
        strict=True,
    ):
        assert status == 422 and part in answer["detail"], answer


def test_classes_count_as_memory(folder: Path, build: Build) -> None:
    api = build(folder)
    assert api.shelf is not None
    ask(api, "pets")
    before = api.shelf.held
    metadata = json.loads((folder / "pets" / "adapter_config.json").read_text())["metadata"]
    changed(folder / "pets", folder / "more", metadata=metadata | {"classnames": [f"c{n}" for n in range(300)]})
    ask(api, "more")
    width = api.shelf.tasks.tasks["more"].head_weight().shape[1]
    assert api.shelf.held - before > 2 * 300 * width * 4  # the features of the texts, and the scaled ones


def test_the_bound_of_memory_holds_and_the_least_recently_used_go(folder: Path, build: Build) -> None:
    shutil.copytree(folder / "pets", folder / "pets2")
    free = build(folder)
    assert free.shelf is not None
    ask(free, "pets")
    one = free.shelf.held
    ask(free, "pets2")
    assert one < free.shelf.held < 1.9 * one  # the random bases of both are the same tensors
    ask(free, "birds", "cars")
    api = build(folder, adapter_memory=(free.shelf.held - 1) / 1e6)
    assert api.shelf is not None
    for names in (["pets", "birds"], ["cars", "pets2"], ["pets"], ["birds", "cars", "pets", "pets2"]):
        check(api, folder, *names)
        assert 0 < api.shelf.held <= api.shelf.limit and api.most_held.value <= api.shelf.limit
        assert set(api.shelf.tasks.adapters.names) == set(api.shelf.tasks.tasks) == set(api.shelf._loaded)
        assert names[-1] in api.shelf._loaded
    small = build(folder, adapter_memory=0.01)
    status, answer = ask(small, "pets")[0]
    assert status == 422 and "more than serve --adapter-memory 0.01 allows" in answer["detail"]
    assert small.shelf is not None and small.shelf.held == 0


def test_files_that_change_while_they_are_served(folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    api = build(folder)
    check(api, folder, "pets", "cars", "birds")
    write(folder / "cars", "cars", seed=5)
    before = alone(folder / "pets")
    damage(folder / "pets")
    os.truncate(folder / "birds.safetensors", 5000)
    pets, cars, birds = ask(api, "pets", "cars", "birds")
    assert pets[0] == birds[0] == 422 and "cannot be read" in birds[1]["detail"]
    assert probabilities(cars) == pytest.approx(alone(folder / "cars"), abs=1e-5)
    damage(folder / "pets")  # the same bit again
    assert probabilities(ask(api, "pets")[0]) == pytest.approx(before, abs=1e-5)
    shutil.rmtree(folder / "cars")
    assert [status for status, _ in ask(api, "cars", "pets")] == [404, 200]

    def replaced(files: Any, to: Path) -> Any:
        result = copied(files, to)
        write(folder / "cars", "cars", seed=6)
        return result

    write(folder / "cars", "cars", seed=5)
    monkeypatch.setattr(on_demand, "_copied", replaced)
    assert ask(api, "cars")[0] == (503, {"detail": "the adapter cars is being changed; send the request again"})
    monkeypatch.setattr(on_demand, "_copied", copied)
    check(api, folder, "cars")


def test_what_cannot_be_in_a_batch_is_answered_alone(folder: Path, build: Build) -> None:
    write(folder / "whole", "cars", adapter=FullFineTuning())
    api = build(folder)
    check(api, folder, "pets", "whole", "cars", "whole")


def test_errors_that_pass_are_tried_again(folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    api = build(folder)
    monkeypatch.setattr(on_demand, "_copied", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    cars, pets = ask(api, "cars", "none")
    assert cars == (503, {"detail": "the adapter cars cannot be loaded now: No space left on device"})
    assert pets[0] == 404
    monkeypatch.setattr(on_demand, "_copied", copied)
    check(api, folder, "cars")
