"""What is built, installed in an empty folder away from the checkout: README and the page on a method run unchanged.

Wheel and source distribution are built. Each is installed into a new environment, which sees the packages of this one.
"""

import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT
from tests.test_readme import FITS, PYTHON, SHELL, SHORT, TASKS, chats, photos, shortened, texts

PAGE = PAGES["docs/method_in_20_lines.md"]
FILES = dict(re.findall(r"Save this as `(\S+)`:\n\n```python\n(.*?)```", PAGE, flags=re.S))
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.S | re.M)
PRINTED, REPORTED = re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.S | re.M)
INSTALL = "python3 -m venv .venv && .venv/bin/pip install . && "

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for bash"),
]


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of an environment that has the wheel, or the source distribution."""
    folder = tmp_path_factory.mktemp(request.param)
    build = [sys.executable, "-m", "hatchling", "build", "-t", request.param, "-d", str(folder / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = (folder / "dist").iterdir()
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "tests.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
    options = ["--no-deps", "--ignore-installed", "--no-index", "--no-build-isolation"]
    install = [str(python), "-m", "pip", "install", *options, str(built)]
    done = subprocess.run(install, capture_output=True, text=True, cwd=folder, env=away(folder / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = pasted("python -c 'import randlora_pl; print(randlora_pl.__file__)'", folder, folder / "bin").stdout
    assert Path(found.strip()).is_relative_to(packages)
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


def test_an_extra_is_added_to_the_installed_package(programs: Path, tmp_path: Path) -> None:
    code = "from randlora_pl.utils.errors import install; print(install('serve'), '--dry-run --no-index')"
    block = pasted(f'python -c "{code}"', tmp_path, programs).stdout
    done = pasted(block, tmp_path, programs)
    assert f"Requirement already satisfied: randlora-pl[serve] in {programs.parent}" in done.stdout, done.stderr


def test_the_readme_runs_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    (quickstart,), after, (_, fit, answer) = SHELL[:3]
    assert quickstart.startswith(INSTALL) and FITS[0] in TASKS
    (tmp_path / ".venv").symlink_to(programs.parent)
    photos(tmp_path / "PHOTOS")
    for name in ("cat", "dog"):
        photos(tmp_path / "DIR" / name, 20)
    texts(tmp_path / "DIR")
    chats(tmp_path / "CHATS")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "QUESTIONS.txt").write_text("Can my dog come with me?\n")
    blocks = [quickstart.removeprefix(INSTALL), "\n".join(after)]
    blocks += [shlex.join([*shlex.split(fit), *shortened(fit), "--model.max_new_tokens", "3"]), answer]
    for command in TASKS:
        more = shortened(command) if command in FITS else SHORT
        blocks.append(shlex.join(["randlora-pl", *shlex.split(command), *more]))
    plain = "import copy, timm\nplain_model = timm.create_model('test_vit')\nmodel = copy.deepcopy(plain_model)\n"
    blocks += [f"python - <<'END'\n{each}END" for each in (PYTHON[0], plain + PYTHON[1])]
    for block in blocks:
        done = pasted(block, tmp_path, programs)
        assert done.returncode == 0, f"{block}\n{done.stdout[-800:]}\n{done.stderr[-2000:]}"
    made = ("merged.safetensors", "predictions.csv", "answers.csv", "tuned.pt", "my-adapter/adapter.safetensors")
    assert all((tmp_path / name).is_file() for name in made)
