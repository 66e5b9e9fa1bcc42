"""Callback that saves the text generated in a test."""

import json
from typing import Any

from lightning.pytorch import Callback, Trainer

from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.files.run_files import run_folder
from randlora_pl.utils.text.console import print_above_progress

FILE = "answers.jsonl"


class WrittenAnswers(Callback):
    """Write ``answers.jsonl`` to the run folder after a test whose task keeps generated text (``written``).

    One line per question, in the order of the tests, for any number of processes. Each line has the test, the prompt,
    the generated text, and either the parsed and the correct answer or the references it was scored against.
    """

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file and print its path."""
        written = getattr(pl_module, "written", [])
        if written and trainer.is_global_zero:
            file = run_folder(trainer) / FILE
            write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written))
            print_above_progress(f"answers: {file} ({len(written):,})")
