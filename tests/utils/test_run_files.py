"""Folders of runs, and their results."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.run.callbacks.summary import model_results
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.run_files import (
    find_adapter,
    find_run,
    find_runs,
    flat,
    follow_latest,
    git_commit,
    link_latest,
    read_results,
    runs_in,
    unlink_latest,
    write_results,
)
from tests.tasks.small import built


def a_run(folder: Path, tested: str | None = "adapter") -> Path:
    """A run folder with the adapter that was tested; None: not finished."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    for name in ("adapter", "adapter-best") if tested else ():
        (folder / name).mkdir()
        (folder / "results.json").write_text(f'{{"tested": "{tested}"}}')
    return folder


def test_a_name_is_its_newest_run_and_latest_is_no_run_of_its_own(tmp_path: Path) -> None:
    old, new = a_run(tmp_path / "a" / "2026-01-01_2"), a_run(tmp_path / "a" / "2026-01-01_10")
    (tmp_path / "a" / "notes").mkdir()
    link_latest(old)
    assert find_run(tmp_path / "a") == new and find_run(str(tmp_path / "a" / "latest")) == old
    link_latest(new)
    assert (tmp_path / "a" / "latest").readlink() == Path(new.name), "relative, so that the folder can be moved"
    assert find_run(tmp_path / "a" / "latest") == find_run(new) == new
    assert runs_in(tmp_path / "a") == [old, new] and len(list((tmp_path / "a").iterdir())) == 4
    assert find_run(tmp_path / "a" / "notes") == tmp_path / "a" / "notes" and not runs_in(tmp_path / "none")


def test_a_sign_like_a_digit_is_a_name(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "run²"), a_run(tmp_path / "²")]
    assert runs_in(tmp_path) == runs


def test_all_runs_of_a_name_are_given_once(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "2026-01-01"), a_run(tmp_path / "2026-01-02")]
    link_latest(runs[1])
    assert find_runs(sorted(tmp_path.iterdir())) == runs
    assert find_runs([tmp_path / "latest", runs[0]]) == [runs[1], runs[0]]
    assert find_runs([runs[0], runs[0]]) == [runs[0], runs[0]]


def test_adapters_of_runs(tmp_path: Path) -> None:
    run, best = a_run(tmp_path / "a" / "1"), a_run(tmp_path / "b" / "1", "adapter-best")
    link_latest(best)
    assert find_adapter(tmp_path / "a") == find_adapter(run) == find_adapter(run / "adapter") == run / "adapter"
    assert find_adapter(tmp_path / "b" / "latest") == best / "adapter-best"
    assert find_adapter(tmp_path / "b" / "latest" / "adapter") == best / "adapter"
    assert find_adapter(tmp_path / "no.safetensors") == tmp_path / "no.safetensors"
    alone = best / "adapter" / "adapter.safetensors"
    assert find_adapter(alone) == alone, "a file that describes itself, perhaps"
    (best / "adapter" / "adapter_config.json").touch()
    assert find_adapter(alone) == best / "adapter"
    unfinished = a_run(tmp_path / "b" / "2", None)
    with pytest.raises(UserError, match=f"fit --resume {unfinished}"):
        find_adapter(tmp_path / "b")
    with pytest.raises(UserError, match=f"fit --resume {unfinished}"):
        find_adapter(unfinished / "adapter")


def test_a_link_to_a_run_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    link_latest(Path("2"))
    for path in (Path("latest"), Path("latest") / "adapter"):
        with pytest.raises(UserError, match=r"points to 2, .* Run: randlora-pl fit --run.name 'my runs'$"):
            follow_latest(path)
    a_run(tmp_path / "my runs" / "1")
    with pytest.raises(UserError, match=r"Run: ln -sfn 1 latest$"):
        find_adapter("latest")


def test_removed_runs(tmp_path: Path) -> None:
    first, second, third = (a_run(tmp_path / name) for name in "123")
    link_latest(third)
    unlink_latest(second)
    assert follow_latest(tmp_path / "latest") == third
    for run, left in ((third, second), (second, first), (first, None)):
        run.rename(tmp_path.parent / f"{tmp_path.name}-{run.name}")
        unlink_latest(run)
        assert (tmp_path / "latest").is_symlink() == bool(left) and follow_latest(tmp_path / "latest").name
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_linked_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latest").write_text("mine")
    link_latest(tmp_path / "1")
    assert (tmp_path / "latest").read_text() == "mine"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("../archive/1")
    link_latest(tmp_path / "1")
    assert (tmp_path / "latest").readlink() == Path("../archive/1"), "the user's"
    (tmp_path / "latest").unlink()

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    link_latest(tmp_path / "1")
    assert not list(tmp_path.iterdir())


def test_figures_are_added_to_older_ones(tmp_path: Path) -> None:
    assert read_results(tmp_path) == {}
    write_results(tmp_path, {"a": 1, "b": 2})
    file = write_results(tmp_path, {"b": 3, "c": None})
    assert json.loads(file.read_text()) == {"a": 1, "b": 3, "c": None}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_nested_values_get_flat_keys() -> None:
    assert flat("a", {"b": 1, "c": {"d": [2], "e": {}}}) == {"a/b": 1, "a/c/d": [2]}


@pytest.mark.parametrize(("kind", "head"), [("vision-language", 0), ("linear head", 4 * 128)])
def test_counts_say_what_belongs_to_the_head(kind: str, head: int) -> None:
    task = built(kind, "lora")
    figures = model_results(task)
    assert figures["trainable_parameters"] == figures["adapter_parameters"] + head
    assert figures["adapter_parameters"] == task.report.trainable
    assert figures["adapter/rank"] == 2 and figures["base/name"] == "tiny"
    assert not any(isinstance(value, dict) for value in figures.values())


def test_commit_is_that_of_the_package_own_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == {}
    for words in (["init", "-q"], ["config", "user.email", "a@b.c"], ["config", "user.name", "n"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "run_files.py").write_text("1")
    assert git_commit(tmp_path) == {}  # a checkout, but of something else
    for words in (["add", "run_files.py"], ["commit", "-q", "-m", "m"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    figures = git_commit(tmp_path)
    assert len(figures["git_commit"]) == 40 and figures["git_changed"] is False
    (tmp_path / "run_files.py").write_text("2")
    assert git_commit(tmp_path)["git_changed"] is True
