"""The page docs/serve.md: its examples run as pasted, and its tables are those of the program."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from randlora_pl import serving
from randlora_pl.serving import ServerOptions, app, uploads
from tests.docs.pages import PAGES
from tests.serving.server import Running

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl, which the examples call")
PAGE = PAGES["docs/serve.md"]
REASONS = dict(re.findall(r"^\| (\d{3}) \| (.+) \|$", PAGE, flags=re.M))


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture(scope="module")
def answers(server: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example prints; the port alone is another one."""
    folder, found = tmp_path_factory.mktemp("pasted"), {}
    for block in re.findall(r"```(?:sh|python)\n(.*?)```", PAGE, flags=re.S):
        if "randlora-pl" in block:
            continue
        program = ["python", "-c"] if block.startswith("import") else ["bash", "-c"]
        text = block.replace(":8000", f":{server.port}")
        done = subprocess.run([*program, text], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
        found[block] = done.stdout
    assert (folder / "three.png").stat().st_size > 50
    return found


def test_examples_classify_the_sample(answers: dict[str, str]) -> None:
    sent = {block: json.loads(answer) for block, answer in answers.items() if block.startswith("curl -") and answer}
    counts = sorted(
        len(answer["classes"]) for answer in sent.values() if "classes" in answer and "status" not in answer
    )
    assert counts == [3, 5, 5]  # top_k, and its default
    ((python, printed),) = ((block, answer) for block, answer in answers.items() if block.startswith("import"))
    first = next(answer for block, answer in sent.items() if "top_k=3" in block)["classes"]
    assert [line.split()[0] for line in printed.splitlines()] == [entry["name"] for entry in first], python


def test_shown_answers_have_the_fields_and_the_words_of_real_ones(answers: dict[str, str]) -> None:
    response, error = map(json.loads, blocks("json"))
    real = {block: json.loads(answer) for block, answer in answers.items() if answer.startswith("{")}
    assert error in real.values()
    (classified,) = (answer for block, answer in real.items() if "top_k=3" in block)
    assert list(response) == list(classified) and list(response["classes"][0]) == list(classified["classes"][0])


def test_every_fact_and_every_status_is_explained(server: Running) -> None:
    facts = server.ask("GET", "/health")[1]
    table = PAGE.partition("| field of `/health` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == list(facts)
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(serving.__path__[0]).glob("*.py"))
    assert set(REASONS) == set(re.findall(r"(?<![\w.,])[45]\d\d(?![\w.,]\d|\d)", sources))


def test_limits_are_those_of_the_program() -> None:
    options = ServerOptions(adapter=Path("a"))
    for words in (
        f"{options.max_upload_mb:g} MB | `--max-upload-mb`",
        f"{options.max_pixels:,} pixels | `--max-pixels`",
        f"at a time | {app.REQUESTS} |",
        f"headers | {uploads.HEADER_SECONDS:g} s",
        f"send the image | {uploads.READ_SECONDS:g} s",
        f"the response | {uploads.ANSWER_SECONDS:g} s",
        f"`--batch-size` ({options.batch_size}), gathered for `--batch-timeout` ({options.batch_timeout:g} s)",
    ):
        assert words in PAGE, words
