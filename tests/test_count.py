"""The code only shrinks: `scripts/count.py` counts it, and these numbers fall with it."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("ruff")  # of the extra "dev"
MOST = {"lines": 60_833, "statements": 33_446, "their lines": 611}
"""Over src and scripts together. Lower them when they allow too much; who adds code removes other code."""
SLACK = 200


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("count")


def test_the_code_does_not_grow(script: ModuleType) -> None:
    found = script.count()
    grown = {name: f"{found[name]} > {most}" for name, most in MOST.items() if found[name] > most}
    assert not grown, "remove as much code as you add"
    loose = {name: found[name] for name, most in MOST.items() if found[name] < most - SLACK}
    assert not loose, f"lower MOST of {__file__} to these numbers"


def test_dense_lines_count_as_the_formatter_lays_them_out(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    text = '"""Text.\n\nMore.\n"""\nimport os; x = [\n  os, 1]  # fmt: skip\n# why\n'
    (tmp_path / "src" / "a.py").write_text(text, encoding="utf-8")
    (tmp_path / "src" / "page.js").write_text("1\n2\n", encoding="utf-8")
    assert script.count(tmp_path) == {
        "lines": 9,
        "statements": 2,
        "files": 1,
        "imports per 100 code lines": 50.0,
        "other files with code": 1,
        "their lines": 2,
    }
