"""Count the code of src and scripts as `ruff format` lays it out; `tests/test_count.py` lets the numbers only fall.

Usage: python scripts/count.py
"""

import ast
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "scripts")
OTHER_CODE = (".js", ".html", ".jinja")
MARKS = re.compile(r"#\s*fmt:\s*(?:skip|off|on)\b")
"""Without these comments the formatter lays out every line."""


def count(root: Path = ROOT) -> dict[str, float]:
    """Count lines (of tables and prompts, too), statements (docstrings excepted), files, and imports."""
    lines = statements = imports = code = 0
    texts = formatted(root)
    for text in texts:
        rows = text.splitlines()
        lines += len(rows)
        code += sum(bool(row.strip()) and not row.lstrip().startswith("#") for row in rows)
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Expr(value=ast.Constant(value=str())):
                    code -= sum(bool(row.strip()) for row in rows[node.lineno - 1 : node.end_lineno])
                case ast.stmt():
                    statements += 1
                    imports += isinstance(node, ast.Import | ast.ImportFrom)
    # The table of the datasets and their prompts were code, and each of their lines still has to be read.
    tables = [*(root / "src").rglob("*.toml"), *(root / "src").rglob("prompts/*.txt")]
    lines += sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tables)
    other = [path for path in (root / "src").rglob("*") if path.suffix in OTHER_CODE]
    return {
        "lines": lines,
        "statements": statements,
        "files": len(texts),
        "imports per 100 code lines": round(100 * imports / code, 1),
        "other files with code": len(other),
        "their lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in other),
    }


def formatted(root: Path) -> list[str]:
    """Lay out a copy of every Python file."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    with TemporaryDirectory() as folder:
        copies = [Path(folder) / f"{number}.py" for number in range(len(files))]
        for file, copy in zip(files, copies, strict=True):
            copy.write_text(MARKS.sub("#", file.read_text(encoding="utf-8")), encoding="utf-8")
        options = ["--isolated", "--no-cache", "--quiet", "--line-length", "120"]
        subprocess.run([sys.executable, "-m", "ruff", "format", *options, folder], check=True)
        return [copy.read_text(encoding="utf-8") for copy in copies]


if __name__ == "__main__":
    for name, number in count().items():
        print(f"{name:28}{number:>10,}")
