"""The notebooks run from top to bottom and show what their text says."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
SHOWS = {
    "full_rank": ["\nLoRA, layer 0: rank 3 of 64", "\nRandLoRA, layer 0: rank 64 of 64", "transformer.resblocks.*.attn"]
}


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SHOWS.keys()


@pytest.mark.parametrize("name", SHOWS)
def test_notebook(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120).execute()
    printed = "\n".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    for line in SHOWS[name]:
        assert line in printed
