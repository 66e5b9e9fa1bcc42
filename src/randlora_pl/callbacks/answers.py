"""Keeps what a model wrote in a test."""

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.utils.files.run_files import run_folder, write_text
from randlora_pl.utils.text.console import print_above_progress

FILE = "answers.jsonl"


class WrittenAnswers(Callback):
    """Writes ``answers.jsonl`` to the run folder after a test whose task kept records of it (``written``).

    A line for each question, in the order of the tests, whatever the number of processes. Each says the test, the
    prompt, what was written, the answer found in it and the right one; or the references that it was scored against.
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file, and says where it is."""
        task: Any = pl_module
        written = getattr(task, "written", [])
        if written and trainer.is_global_zero:
            file = run_folder(trainer) / FILE
            write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written))
            print_above_progress(f"answers: {file} ({len(written):,})")
