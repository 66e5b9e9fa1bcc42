"""``randlora-pl`` for pasted blocks: a process that has imported everything and forks for each command.

    python -m tests.docs.pasted.server SOCKET

A block of shell starts `CLIENT`, which passes on its words, folder, environment and files.
Trainings and measurements are shortened here, so that the blocks stay as they are on the page.
"""

import importlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path

from tests.docs.pasted.shorter import shorter

CLIENT = """\
#!{python} -SE
import json, os, socket, sys
words = dict(words=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
with socket.socket(socket.AF_UNIX) as server:
    server.connect({server!r})
    socket.send_fds(server, [b"*"], [0, 1, 2])
    server.sendall(json.dumps(words).encode() + b"\\0")
    sys.exit(int(server.recv(9) or 70))
"""
IMPORTED = (
    *("lightning", "open_clip", "timm", "torchmetrics", "peft", "transformers", "matplotlib.pyplot"),
    *("torch.utils.tensorboard", "onnxruntime", "randlora_pl.tasks", "randlora_pl.language", "randlora_pl.interop"),
    *("randlora_pl.lab", "randlora_pl.lab.analysis", "randlora_pl.run.callbacks"),
)


def answer(connection: socket.socket) -> None:
    """Run one command in a process of its own, and send its exit code."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    asked = bytearray()
    while not asked.endswith(b"\0"):
        asked += connection.recv(65536)
    order = json.loads(asked[:-1])
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # pipes
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    words = shorter(order["words"])
    sys.argv = [sys.argv[0], *words]
    code = 70
    try:
        code = importlib.import_module("randlora_pl.commands.main").main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(code).encode())


def serve(path: str) -> None:
    """Answer one connection after the other, each in a fork."""
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(5)
        while os.getppid() == parent:  # ends with the tests
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            with connection:
                if (child := os.fork()) == 0:
                    server.close()
                    connection.setblocking(True)
                    answer(connection)
                    os._exit(0)
                os.waitpid(child, 0)


if __name__ == "__main__":
    serve(str(Path(sys.argv[1]).absolute()))
