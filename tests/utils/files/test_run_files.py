from pathlib import Path

from lightning.pytorch import Trainer

from randlora_pl.utils.files.run_files import run_folder


def test_folder_is_the_root_of_the_trainer(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    assert run_folder(trainer) == tmp_path
