"""A server with a folder of adapters: names for those who may see them, and an attack on all of it."""

import asyncio
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
import torch
import uvicorn
from litserve.utils import LitAPIStatus, WorkerSetupStatus

from randlora_pl.commands.main import main
from randlora_pl.serving import app
from randlora_pl.serving.uploads import Connection
from tests.docs.pages import PAGES
from tests.serving.folder import BAD_NAMES, REFUSED, damage, fill, write
from tests.serving.server import FORM, Running, form, free_port, wait_until
from tests.serving.test_on_demand import PICTURES, alone, probabilities

SECTION = PAGES["docs/serve.md"].partition("## Several adapters")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """The server that the command makes, in a thread instead of LitServe's processes; the attack has these."""
    folder, made, client = tmp_path_factory.mktemp("many"), list[app.Server](), object.__new__(Running)
    client.port, client.token = free_port(), ""
    for name, kind in (("digits", "pets"), ("cars", "cars")):
        write(folder / "adapters" / name, kind)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(app, "trust_the_limit", lambda: None)  # of the server's processes
        patched.setattr("gc.unfreeze", lambda: None)
        patched.setattr(app.Server, "run", lambda server, **_: made.append(server))
        words = ["--adapters", "adapters", "--token", "s3cret", "--port", str(client.port), "--device", "cpu"]
        assert main(["serve", *words]) == 130
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        (server,) = made
        server.lit_api._build("cpu")
    torch.set_num_threads(1)

    def put(entry: tuple[int, str, float, Any]) -> None:
        asyncio.get_running_loop().call_soon(answer, entry[1], entry[3])

    def answer(uid: str, upload: Any) -> None:
        item, (response,) = server.response_buffer[uid], server.lit_api.predict([upload])
        item.response = response, LitAPIStatus.OK
        item.event.set()

    server.litapi_request_queues["/predict"] = SimpleNamespace(put=put)
    server.workers_setup_status = {"predict_0": WorkerSetupStatus.READY}
    config = uvicorn.Config(server.app, port=client.port, lifespan="off", log_level="warning", http=Connection)
    listener = uvicorn.Server(config)
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    assert wait_until(lambda: listener.started)
    yield client, folder / "adapters"
    listener.should_exit = True
    thread.join()


def test_a_request_names_its_adapter(many: tuple[Running, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, folder = many
    names = ["cars", "digits"]
    for path in ("/predict", "/predict?adapter=cars", "/predict?adapter=none"):
        status, answer = server.ask("POST", path, PICTURES[0], "image/*")
        assert status == 401 and not any(name in answer["detail"] for name in names)
    assert server.ask("GET", "/health") == (200, {"status": "ready"})
    monkeypatch.setattr(server, "token", "s3cret")
    facts = server.ask("GET", "/health")[1]
    assert facts["adapters"] == names and "classes" not in facts
    assert re.findall(r"^\| `(\w+)` \|", SECTION, flags=re.M)[-2:] == [*facts][-2:]
    assert server.classify(PICTURES[0]) == (400, {"detail": "choose one of the adapters, adapter=NAME: cars, digits"})
    expected = {name: pytest.approx(alone(folder / name), abs=1e-5) for name in names}
    for name in names:
        assert probabilities(server.classify(PICTURES[0], f"?adapter={name}")) == expected[name]
    body, kind = form(PICTURES[0])
    start = form(b"cars", "adapter", None)[0].removesuffix(f"--{FORM}--\r\n".encode())
    assert probabilities(server.ask("POST", "/predict", start + body, kind)) == expected["cars"]
    status, answer = server.ask("POST", "/predict?adapter=digits", start + body, kind)
    assert status == 400 and "one of the adapters" in answer["detail"]
    assert server.ask("POST", "/predict", body, kind)[0] == 400
    assert server.classify(PICTURES[0], "?adapter=cars&adapter=digits")[0] == 400
    held = server.ask("GET", "/health")[1]["adapter_bytes"]
    assert 0 < held["most_held"] < held["limit"] == 1_000_000_000


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl, which the examples call")
def test_the_example_of_the_page(many: tuple[Running, Path], tmp_path: Path) -> None:
    (tmp_path / "three.png").write_bytes(PICTURES[0])
    (block,) = (each for each in re.findall(r"```sh\n(.*?)```", SECTION, flags=re.S) if each.startswith("curl"))
    text = block.replace(":8000", f":{many[0].port}").replace("curl", "curl -sH 'Authorization: Bearer s3cret'")
    printed = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert probabilities((200, json.loads(printed))) == pytest.approx(alone(many[1] / "digits"), abs=1e-5)


GOOD = {"pets": "pets", "cars": "cars", "birds": "birds", "more": "cars", "and more": "birds"}


@pytest.mark.slow
def test_an_attack_gets_no_wrong_answer(tmp_path: Path) -> None:
    """200 requests at a time name adapters that are good, bad or none, while a thread replaces, deletes and damages."""
    torch.set_num_threads(1)
    folder, versions = fill(tmp_path / "adapters"), tmp_path / "versions"
    for name in GOOD:
        (folder / "birds.safetensors").unlink(missing_ok=True)
        for seed in range(2):
            write(versions / str(seed) / name, GOOD[name], seed=seed)
        shutil.copytree(versions / "0" / name, folder / name, dirs_exist_ok=True)
    right = {
        (name, picture): [alone(versions / str(seed) / name, picture) for seed in range(2)]
        for name, picture in itertools.product(GOOD, range(len(PICTURES)))
    }
    limit = 1.5  # MB: of some of them
    server = Running(None, tmp_path / "log", "--adapters", str(folder), "--adapter-memory", str(limit)).wait()
    ended, changes = threading.Event(), random.Random(0)

    def change() -> None:
        while not ended.wait(0.1):
            name = changes.choice([*GOOD])
            match changes.randrange(4):
                case 0:
                    shutil.rmtree(folder / name, ignore_errors=True)
                case 1:
                    if (folder / name).is_dir():
                        damage(folder / name)
                case _:
                    new = tmp_path / "new"
                    shutil.copytree(versions / str(changes.randrange(2)) / name, new)
                    shutil.rmtree(folder / name, ignore_errors=True)
                    new.replace(folder / name)

    def ask(number: int) -> tuple[str, int, tuple[int, Any]]:
        chance = random.Random(number)
        name = chance.choice([*GOOD] * 4 + [*REFUSED] + BAD_NAMES)
        picture = chance.randrange(len(PICTURES))
        while True:
            answer = server.classify(PICTURES[picture], f"?top_k=9&adapter={quote(name, safe='')}")
            if answer[0] != 503 or "too many" not in answer[1]["detail"]:  # 72 of the 200 get this at a time
                return name, picture, answer
            time.sleep(0.05)

    try:
        workers, changer = server.workers(), threading.Thread(target=change)
        changer.start()
        try:
            with ThreadPoolExecutor(200) as pool:
                answers = list(pool.map(ask, range(1000)))
        finally:
            ended.set()
            changer.join()
        for name, picture, answer in answers:
            if name not in GOOD:
                assert answer[0] == (404 if name in BAD_NAMES else REFUSED[name][0]) or answer[0] == 504, (name, answer)
            elif answer[0] == 200:
                found = probabilities(answer)
                assert any(found == pytest.approx(each, abs=1e-5) for each in right[name, picture]), (name, answer)
            else:
                assert answer[0] in (404, 422, 503, 504), answer
        counts = {status: sum(answer[0] == status for *_, answer in answers) for status in (200, 404, 422, 503)}
        assert counts[200] > 100 and counts[404] > 50 and counts[422] > 50, counts
        for name in GOOD:
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(versions / "1" / name, folder / name)
            assert probabilities(server.classify(PICTURES[0], f"?top_k=9&adapter={quote(name)}")) == pytest.approx(
                right[name, 0][1], abs=1e-5
            )
        held = server.ask("GET", "/health")[1]["adapter_bytes"]
        assert 0.3 * held["limit"] < held["most_held"] <= held["limit"] == 1e6 * limit
        assert server.workers() == workers and "Traceback" not in server.log.read_text(), server.log.read_text()
    finally:
        server.kill()
