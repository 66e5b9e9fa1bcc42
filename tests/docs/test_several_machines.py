"""The trial on the page about several machines is what two processes do."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from randlora_pl.commands.main import main
from tests.docs.pages import PAGES, ROOT, joined

PAGE = PAGES["docs/many_devices.md"]
TRIAL = next(
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S) for line in joined(block) if "=two" in line
)
SAME = ("trainable", "batch", "precision", "exchanged")
"""Lines that do not depend on the number of steps."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the script is for bash")
def test_two_processes_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "cp", "torchrun.sh"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = os.environ | {
        "PATH": path,
        "PYTHONPATH": str(ROOT / "src"),
        "PORT": port,
        "RESTARTS": "0",
        "COLUMNS": "120",
    }
    short = "--data.steps 2 --trainer.enable_progress_bar false"
    done = subprocess.run(["bash", "-c", f"{TRIAL} {short}"], capture_output=True, text=True, env=shell)
    assert done.returncode == 0, done.stderr
    printed = {" ".join(line.split()) for line in done.stdout.splitlines()}
    shown = [
        " ".join(line.split())
        for block in re.findall(r"```text\n(.*?)```", PAGE, flags=re.S)
        for line in block.splitlines()
    ]
    expected = {line for line in shown if line.startswith(SAME)}
    assert len(expected) == len(SAME) and expected <= printed, done.stdout
