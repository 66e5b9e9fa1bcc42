from pathlib import Path

from randlora_pl.utils.files.run_files import run_folder, write_text
from tests.callbacks.conftest import Fit


def test_folder_is_the_root_of_the_trainer(fit: Fit, tmp_path: Path) -> None:
    assert run_folder(fit()[0]) == tmp_path


def test_text_replaces_an_older_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    for text in ("one", "zwei ü"):
        write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]
