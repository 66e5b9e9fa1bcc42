"""A real server process on a free port of the loopback interface, and a client of a few lines."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

FORM = "--------------------------boundary"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def form(content: bytes, field: str = "image", filename: str | None = "a.png") -> tuple[bytes, str]:
    named = f'; filename="{filename}"' if filename else ""
    head = f'--{FORM}\r\nContent-Disposition: form-data; name="{field}"{named}\r\n\r\n'
    return head.encode() + content + f"\r\n--{FORM}--\r\n".encode(), f"multipart/form-data; boundary={FORM}"


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition: Any, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


class Running:
    """A server, from its start to its end."""

    def __init__(self, adapter: Path | None, log: Path, *options: str) -> None:
        self.port, self.log, self.token = free_port(), log, ""
        own = [] if adapter is None else ["--adapter", str(adapter)]
        words = ["serve", *own, "--port", str(self.port), "--device", "cpu", *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "randlora_pl", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def wait(self) -> "Running":
        up = wait_until(lambda: self.process.poll() is not None or "Ready: " in self.log.read_text(), 120)
        assert up and self.process.poll() is None, self.log.read_text()
        assert wait_until(self._listens), self.log.read_text()
        return self

    def _listens(self) -> bool:
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: Any = None, kind: str = "", timeout: float = 60.0) -> tuple[int, Any]:
        """The status, and the answer: of JSON what it says, else text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            connection.request(method, path, body, headers | ({"Content-Type": kind} if kind else {}))
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.getheader("Content-Type", "") else text
        finally:
            connection.close()

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return bytes(answer.read())

    def classify(self, content: bytes, query: str = "") -> tuple[int, Any]:
        return self.ask("POST", f"/predict{query}", content, "image/*")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def family(self) -> dict[int, str]:
        """Process id and command line of all that it started, and itself."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    if os.getsid(int(entry.name)) == self.process.pid and alive(int(entry.name)):
                        found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
                except (ProcessLookupError, FileNotFoundError):
                    continue
        return found

    def workers(self) -> list[int]:
        """The processes that hold a model."""
        return [pid for pid, command in self.family().items() if "spawn_main" in command]

    def end(self, number: signal.Signals = signal.SIGTERM, everyone: bool = False) -> int:
        """Sends a signal to the server, or to its whole group as Ctrl-C does; the exit code."""
        (os.killpg if everyone else os.kill)(self.process.pid, number)
        return self.process.wait(30)

    def kill(self) -> None:
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
