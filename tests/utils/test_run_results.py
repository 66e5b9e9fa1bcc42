import json
import subprocess
from pathlib import Path

import pytest

from randlora_pl.utils.run_files import environment, flat, git_commit, model_results, read_results, write_results
from tests.tasks.small import built


def test_figures_are_added_to_older_ones(tmp_path: Path) -> None:
    assert read_results(tmp_path) == {}
    write_results(tmp_path, {"a": 1, "b": 2})
    file = write_results(tmp_path, {"b": 3, "c": None})
    assert json.loads(file.read_text()) == {"a": 1, "b": 3, "c": None}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, {"a": 1})

    def broken(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, {"a": 2})
    assert read_results(tmp_path) == {"a": 1}


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


def test_environment_has_versions() -> None:
    found = environment()
    assert found["version"] and found["version/torch"] and found["cpu_threads"] >= 1
