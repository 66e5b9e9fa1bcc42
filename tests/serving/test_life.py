"""Starting and ending: no process may be left, whatever ends the server."""

import itertools
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import timm
import torch

from randlora_pl.adapters import RandLoRA
from randlora_pl.serving import ServerOptions, app
from randlora_pl.tasks import LinearHeadTask
from randlora_pl.utils.errors import UserError
from tests.serving import pictures
from tests.serving.server import Running, alive, wait_until


@pytest.mark.slow
def test_a_killed_worker_s_request_fails_soon_a_new_one_answers_and_ctrl_c_ends_all(
    adapter: Path, digit: bytes, tmp_path: Path
) -> None:
    large = pictures.encode(pictures.photo(6000, 5000), "PNG")  # takes long enough to be killed at
    server = Running(adapter, tmp_path / "log", "--batch-size", "1").wait()
    try:
        expected = server.classify(digit)
        (worker,) = server.workers()
        before = processor_seconds(worker)
        with ThreadPoolExecutor() as pool:
            held = pool.submit(server.classify, large)
            assert wait_until(lambda: processor_seconds(worker) > before + 0.1)
            os.kill(worker, signal.SIGKILL)
            killed = time.monotonic()
            status, answer = held.result(60)
            assert status == 503 and "lost" in answer["detail"], answer
            assert time.monotonic() - killed < 5  # half a second on an idle machine
        assert wait_until(lambda: server.workers() not in ([], [worker]))
        assert wait_until(lambda: server.ask("GET", "/health")[0] == 200)
        assert server.classify(digit) == expected
        family = server.family()
        with server.connect() as idle:  # connections that are open do not delay the end
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(12) == b"HTTP/1.1 200"
            assert server.end(signal.SIGINT, everyone=True) == 130
        assert wait_until(lambda: not any(map(alive, family)), 5), server.family()
        said = server.log.read_text().splitlines()
        assert "Worker 0 was lost; starting another one" in said
        assert said[-1] == "randlora-pl: interrupted"
        assert not any("Traceback" in line or "Error" in line for line in said), said
    finally:
        server.kill()


def processor_seconds(pid: int) -> float:
    """Of a process, in user mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.faults
def test_nothing_outlives_a_killed_server(adapter: Path, tmp_path: Path) -> None:
    server = Running(adapter, tmp_path / "log", "--workers", "2").wait()
    try:
        family = server.family()
        server.end(signal.SIGKILL)
        assert wait_until(lambda: not any(map(alive, family)), 10), server.family()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", server.port))
    finally:
        server.kill()


@pytest.fixture
def baseless(tmp_path: Path) -> Path:
    """An adapter of weights that are gone."""
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_vit").state_dict(), weights)
    task = LinearHeadTask(name="test_vit", pretrained=str(weights), adapter=RandLoRA(rank=6))
    task.set_classes(["a", "b"], ["{}"])
    task.adapt()
    folder = task.save(tmp_path / "adapter")
    weights.unlink()
    return folder


def test_a_worker_that_cannot_build_the_model_gives_its_error_to_the_server(
    baseless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = app.ClassifierAPI(ServerOptions(adapter=baseless, workers=64), 10**6)
    for name in ("signal.signal", "end_with_parent", "trust_the_limit"):  # of the worker's process
        monkeypatch.setattr(f"randlora_pl.serving.app.{name}", lambda *_: None)
    with pytest.raises(UserError):
        api.setup("cpu")
    dead = MagicMock(exitcode=1, is_alive=lambda: False)
    server: Any = SimpleNamespace(lit_api=api, inference_workers=[dead], workers_setup_status={})
    with pytest.raises(UserError, match=r"weights\.pt"):
        app.Server.verify_worker_status(server)


@pytest.mark.slow
def test_a_model_that_cannot_be_built_ends_in_one_line(baseless: Path, tmp_path: Path) -> None:
    """The worker finds it out, and the server says so."""
    server = Running(baseless, tmp_path / "log")
    try:
        assert server.process.wait(60) == 2
        *_, last = server.log.read_text().splitlines()
        assert last.startswith("randlora-pl: error: ") and "weights.pt" in last
        assert "http://" not in server.log.read_text()  # which would never have answered
        assert "Traceback" not in server.log.read_text()
        assert not server.family()
    finally:
        server.kill()


@pytest.mark.faults
@pytest.mark.parametrize("lost", [False, True])
def test_ctrl_c_and_a_killed_worker_while_the_model_is_built(adapter: Path, tmp_path: Path, lost: bool) -> None:
    server = Running(adapter, tmp_path / "log")
    try:
        assert wait_until(lambda: bool(server.workers()), 60)
        family = server.family()
        if lost:
            os.kill(server.workers()[0], signal.SIGKILL)
            assert server.process.wait(30) == 1
        else:
            assert server.end(signal.SIGINT, everyone=True) == 130
        assert wait_until(lambda: not any(map(alive, family)), 5), server.family()
        said = server.log.read_text()
        assert said.endswith("(exit code -9): out of memory?\n" if lost else "randlora-pl: interrupted\n"), said
        assert ("has lost a worker that was building the model" in said) == lost and "Traceback" not in said, said
    finally:
        server.kill()


KINDS = ("grey.png", "colour.jpg", "large.jpg", "clear.png", "moving.gif", "turned.jpg")
EVERY = 20
"""Each of so many uploads is a truncated JPEG, which must be refused with 422."""


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a process that are in memory (RSS), and those that it shares with no other (USS)."""
    words = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    sizes = {line[0]: 1024 * int(line[1]) for line in words if line[-1] == "kB"}
    return sizes["Rss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"]


def hammer(server: Running, seconds: float, threads: int = 16) -> tuple[int, list[dict[int, tuple[int, int]]]]:
    """Ask for predictions from threads that each ask again at once."""
    good, cut = pictures.good(), pictures.bad()["cut JPEG"][0]
    expected = {name: server.classify(good[name])[1]["classes"][0] for name in KINDS}
    right, wrong, memory, numbers = list[str](), list[str](), [], itertools.count()
    end = time.monotonic() + seconds

    def ask() -> None:
        while time.monotonic() < end:
            number = next(numbers)
            name, bad = KINDS[number % len(KINDS)], number % EVERY == 0
            try:
                status, answer = server.classify(cut if bad else good[name])
            except OSError as error:
                wrong.append(repr(error))
                continue
            best = answer["classes"][0] if status == 200 else {}
            fine = status == 422 if bad else best == pytest.approx(expected[name], abs=1e-5)
            (right if fine else wrong).append(f"{status} {answer}")

    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in asking:
        thread.start()
    while any(thread.is_alive() for thread in asking):
        time.sleep(min(5, max(0.1, end - time.monotonic())))
        memory.append({pid: memory_of(pid) for pid in server.family()})
    assert not wrong, wrong[:5]
    return len(right), memory


@pytest.mark.slow
def test_a_minute_at_saturation(adapter: Path, tmp_path: Path) -> None:
    server = Running(adapter, tmp_path / "log").wait()
    try:
        hammer(server, 20)  # caches and allocators fill
        family = server.family()
        count, memory = hammer(server, 60)
        assert count >= 1000
        assert server.family().keys() == family.keys()  # no process was lost or added
        third = len(memory) // 3
        for pid, command in family.items():
            for which in (0, 1):
                early, late = (
                    sorted(sample[pid][which] for sample in part)[third // 2]
                    for part in (memory[:third], memory[-third:])
                )
                # In the 40 seconds between, some 8,000 requests, a leak of 1 kB a request would add 8 MB.
                assert late - early < 4e6, (command, which, early, late)
        assert server.end() == 143
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
