"""The page on a method of one's own, run unchanged in an empty folder with the built wheel, away from the checkout.

`.ci/run` installs the wheel into the environment of the tests, so that there is nothing to build there. Elsewhere the
wheel is built into a new environment, which sees the packages of this one. This needs hatchling, from a package index.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

import randlora_pl
from tests.docs.pages import PAGES, ROOT

PAGE = PAGES["docs/method_in_20_lines.md"]
FILES = dict(re.findall(r"Save this as `(\S+)`:\n\n```python\n(.*?)```", PAGE, flags=re.S))
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.S | re.M)
PRINTED, REPORTED = re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.S | re.M)
NO_INDEX = r"(No matching distribution found|Could not find a version|Could not install|No module named).*hatchling"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for bash"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of an environment that has the wheel."""
    if Path(randlora_pl.__file__).is_relative_to(sysconfig.get_path("purelib")):
        return Path(sys.executable).parent
    folder = tmp_path_factory.mktemp("new")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "tests.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
    options = ["--no-deps", "--force-reinstall", "--retries", "1"]
    options += ["--no-build-isolation"] if find_spec("hatchling") else []
    install = [str(python), "-m", "pip", "install", *options, str(ROOT)]
    done = subprocess.run(install, capture_output=True, text=True, env=away(folder / "bin"))
    if done.returncode and (reason := re.search(NO_INDEX, done.stdout + done.stderr)):
        pytest.skip(f"the wheel needs hatchling to be built, and a package index for it: {reason[0]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


def away(programs: Path) -> dict[str, str]:
    """The environment of a user without a checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RANDLORA_PL_RUN"))}
    return kept | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONNOUSERSITE": "1"}


def pasted(block: str, folder: Path, programs: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of shell."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=away(programs), capture_output=True, text=True
    )


def test_the_page_runs_with_the_wheel_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    where = pasted("python -c 'import randlora_pl; print(randlora_pl.__file__)'", tmp_path, programs).stdout.strip()
    assert where.endswith("__init__.py") and not Path(where).is_relative_to(ROOT / "src"), where
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for number, block in enumerate(BLOCKS):
        done = pasted(block, tmp_path, programs)
        assert done.returncode == 0, f"{block}\n{done.stdout[-800:]}\n{done.stderr[-2000:]}"
        assert number or done.stdout == PRINTED
    assert (tmp_path / "mine.csv").read_text(encoding="utf-8").startswith("image,")
    assert (tmp_path / "mine.safetensors").stat().st_size > 100_000
    (tmp_path / "mine.py").write_text(FILES["mine.py"].replace("torch.zeros", "torch.ones"), encoding="utf-8")
    broken = pasted(BLOCKS[0], tmp_path, programs)
    assert broken.returncode == 1 and broken.stderr.endswith(REPORTED), broken.stderr
