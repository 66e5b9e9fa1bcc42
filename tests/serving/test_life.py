"""Starting and ending: no process may be left, whatever ends the server."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch

from randlora_pl.adapters import RandLoRA
from randlora_pl.tasks import LinearHeadTask
from tests.serving import pictures
from tests.serving.server import Running, alive, wait_until


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_ctrl_c_ends_all(adapter: Path, digit: bytes, tmp_path: Path) -> None:
    server = Running(adapter, tmp_path / "log", "--batch-size", "1").wait()
    try:
        expected = server.classify(digit)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        assert wait_until(lambda: server.workers() not in ([], [worker]))
        assert server.classify(digit) == expected
        assert wait_until(lambda: server.ask("GET", "/health")[0] == 200)
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


@pytest.mark.slow
def test_a_killed_worker_s_request_fails_soon_and_the_next_is_answered(
    adapter: Path, digit: bytes, tmp_path: Path
) -> None:
    large = pictures.encode(pictures.photo(6000, 5000), "PNG")  # takes long enough to be killed at
    server = Running(adapter, tmp_path / "log").wait()
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


@pytest.mark.faults
def test_ctrl_c_while_the_model_is_built(adapter: Path, tmp_path: Path) -> None:
    server = Running(adapter, tmp_path / "log")
    try:
        assert wait_until(lambda: bool(server.workers()), 60)
        family = server.family()
        assert server.end(signal.SIGINT, everyone=True) == 130
        assert wait_until(lambda: not any(map(alive, family)), 5), server.family()
        said = server.log.read_text()
        assert said.endswith("randlora-pl: interrupted\n") and "Traceback" not in said, said
    finally:
        server.kill()


def test_a_model_that_cannot_be_built_ends_in_one_line(tmp_path: Path) -> None:
    """The worker finds it out, and the server says so."""
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_vit").state_dict(), weights)
    task = LinearHeadTask(name="test_vit", pretrained=str(weights), adapter=RandLoRA(rank=6))
    task.set_classes(["a", "b"], ["{}"])
    task.configure_model()
    folder = task.save(tmp_path / "adapter")
    weights.unlink()
    server = Running(folder, tmp_path / "log")
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
def test_a_worker_killed_while_it_builds(adapter: Path, tmp_path: Path) -> None:
    server = Running(adapter, tmp_path / "log")
    try:
        assert wait_until(lambda: bool(server.workers()), 60)
        os.kill(server.workers()[0], signal.SIGKILL)
        assert server.process.wait(30) == 1
        *_, last = server.log.read_text().splitlines()
        assert "has lost a worker that was building the model (exit code -9)" in last
        assert not server.family()
    finally:
        server.kill()
