"""Hook of MkDocs: the notebooks as pages.

They are shown without outputs, as they are committed, unless ``RANDLORA_PL_NOTEBOOKS`` is set: then each runs from top
to bottom, which takes some minutes, and its page has its outputs and plots.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
BARE = """

!!! note
    This page was made without running the notebook. Run it yourself: open `notebooks/{}` of a checkout in Jupyter.
"""


def page(path: Path, run: bool) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its plots by path below the page's folder."""
    notebook = nbformat.read(path, as_version=4)
    if run:
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    names = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=names)
    title, _, rest = text.replace("](../docs/", "](../").partition("\n")
    return f"{title}{'' if run else BARE.format(path.name)}\n{rest}", resources["outputs"]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each notebook, and its plots."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text, plots = page(path, bool(os.environ.get("RANDLORA_PL_NOTEBOOKS")))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in plots.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
