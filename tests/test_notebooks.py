"""The notebooks run from top to bottom, in any folder and without a network, and show what their text says."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
FACTS = {
    "1_first_classifier": """
assert before["test/acc"] < 0.1 and after["test/acc"] > 0.93
assert trainer.global_step == 120 and task.report.trainable == 149_424 and len(test) == 358
assert int(counts.trace()) == 358 - len(wrong) == round(after["test/acc"] * 358)
assert counts.sum(1).tolist() == np.bincount(test.labels).tolist()
for place in wrong:  # the file's own folder says what is right
    folder_name = Path(test.images.name(int(test.rows[place]))).parent.name
    assert folder_name == data.classnames[truth[place]] != data.classnames[guesses[place]]
assert len(files) == len(of_new) == 8 and sum(len(data.samples(part)) for part in ("train", "val", "test")) == 1789
right = [saved.classnames[row.argmax()] == file.stem[5:] for file, row in zip(files, of_new, strict=True)]
assert sum(right) >= 6
assert np.allclose(onnx_probabilities, of_new[:1], atol=0.05)
""",
    "2_your_own_method": """
assert len(checks) == 13 and {"start", "count", "files", "resume"} <= set(checks)
assert "count returns 48, 112 numbers train" in broken
sizes = {name: task.report.trainable for name, task in tasks.items()}
assert sizes == {"RankOne": 23_296, "LoRA": 139_776, "RandLoRA": 149_424}  # so `count` is repaired
assert all(accuracy > 0.8 for accuracy in accuracies.values())
assert (ranks["RankOne"], ranks["LoRA"]) == (1, 6) and ranks["RandLoRA"] > 0.95 * 192
""",
    "3_reading_a_comparison": """
assert len(cells) == 21 and set(cells["state"]) == {"finished"}
for name, accuracy in zip(cells["cell"], cells["accuracy"], strict=True):
    results = json.loads((folder / "sweep" / "cells" / name / "results.json").read_text())
    assert accuracy == 100 * results["test/acc"]
runs = {method: list(cells[cells["method"] == method].sort_values("seed")["accuracy"]) for method in estimates.index}
pairs = {other: [a - b for a, b in zip(runs["RandLoRA-6"], runs[other], strict=True)] for other in differences}
assert estimates["half"].isna()["zero-shot"] and len(pairs) == 3
gaps = {name: (values.mean(), half_width(values)) for name, values in differences.items()}
assert gaps["LoRA-6 at 1e-2"][0] - gaps["LoRA-6 at 1e-2"][1] > 10
assert abs(gaps["LoRA-6 at 3e-2"][0]) < gaps["LoRA-6 at 3e-2"][1]  # the interval contains 0
assert estimates["mean"].idxmax() == "linear probe"
for values, mean, half in [
    *((runs[name], estimates["mean"][name], estimates["half"][name]) for name in by_seed),
    *((values, differences[name].mean(), half_width(differences[name])) for name, values in pairs.items()),
]:
    assert abs(mean - sum(values) / 5) < 1e-9
    deviation = (sum((value - mean) ** 2 for value in values) / 4) ** 0.5
    assert abs(half - 2.776445 * deviation / 5**0.5) < 1e-5  # t of four degrees of freedom
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
    code = SCRIPTS.get(name) or re.sub("^%.*", "", "\n".join(code_of(name)), flags=re.M)
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    found = [node for node in found if name in FACTS or str(node.module).startswith("randlora_pl")]
    assert found or name in SCRIPTS
    for node in found:
        if node.module != "mine":  # the notebook writes it
            exec(ast.unparse(node), {})


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
    if name == "1_first_classifier":
        pytest.importorskip("onnxruntime", reason='it exports with the extra: pip install ".[onnx]"')
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
