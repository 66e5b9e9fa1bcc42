from pathlib import Path

from lightning.pytorch import Trainer

from randlora_pl.utils.files.run_files import run_folder, write_text


def test_folder_is_the_root_of_the_trainer(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    assert run_folder(trainer) == tmp_path


def test_text_replaces_an_older_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    for text in ("one", "zwei ü"):
        write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]
