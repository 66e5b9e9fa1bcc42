"""The files around the code: container images run what they promise, templates and rules can be read."""

import json
import os
import re
import shlex
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

from randlora_pl.commands.main import COMMANDS
from randlora_pl.run.session import prepare

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DEVCONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def lines_of(word: str) -> list[str]:
    """What stands behind an instruction of the Dockerfile."""
    return re.findall(rf"^{word} (.*)$", DOCKERFILE, flags=re.M)


def extras_of(command: str) -> set[str]:
    return {extra for names in re.findall(r"\[([a-z0-9,]+)\]", command) for extra in names.split(",")}


def test_containers_install_extras_that_exist_and_start_the_quickstart() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (install, _) = lines_of("RUN")
    for command in (install, DEVCONTAINER["postCreateCommand"]):
        assert extras_of(command) and extras_of(command) <= extras.keys(), command
    words = [json.loads(line) for line in (*lines_of("ENTRYPOINT"), *lines_of("CMD"))]
    assert words == [["randlora-pl"], ["fit", "--config", "quickstart"]]
    assert shlex.split(DEVCONTAINER["postAttachCommand"]) == words[0] + words[1]
    prepare("fit", words[1][1:])
    examples = re.findall(r"^#   docker run .*? randlora-pl (\w.*)$", DOCKERFILE, flags=re.M)
    assert examples
    for example in examples:
        verb, *rest = shlex.split(example)
        assert verb in COMMANDS
        prepare(verb, rest)


@pytest.mark.slow  # installs the project into a new environment
def test_the_image_can_be_installed_and_runs(tmp_path: Path) -> None:
    """The lines with pip, in a new environment that sees the packages of this one; another user needs a container."""
    venv.create(tmp_path / "new", with_pip=True)
    python = tmp_path / "new" / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONNOUSERSITE": "1"}
    install, user = lines_of("RUN")
    assert install.startswith("pip install ") and user.startswith("useradd ")
    for command in (
        install.replace("/source", str(ROOT)) + " --no-deps --force-reinstall",
        "randlora-pl fit --config quickstart --data.steps 2 --trainer.accelerator cpu",
    ):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("runs/quickstart/*/adapter/adapter.safetensors"))
    assert str(packages) in subprocess.run(
        [str(python), "-c", "import randlora_pl; print(randlora_pl.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_templates_of_issues_are_forms() -> None:
    forms = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in TEMPLATES if path.stem != "config"]
    assert len(forms) == 2
    for form in forms:
        assert form["name"] and form["description"]
        fields = [part for part in form["body"] if part["type"] != "markdown"]
        assert all(part["attributes"]["label"] and part["id"] for part in fields)
        assert any(part.get("validations", {}).get("required") for part in fields)
    assert "randlora-pl doctor" in TEMPLATES[0].read_text(encoding="utf-8")


def test_paths_that_they_name_exist() -> None:
    texts = [
        *TEMPLATES,
        ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md",
        ROOT / "CODE_OF_CONDUCT.md",
        ROOT / "SECURITY.md",
    ]
    found = [name for path in texts for name in re.findall(r"[\w/]+\.(?:md|toml|txt)\b", path.read_text("utf-8"))]
    assert found and all((ROOT / name).is_file() for name in found), found


def test_what_a_pull_request_must_pass_is_what_contributors_run() -> None:
    template = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "mypy", "lint-imports", "pytest"):
        assert command in template and command in script, command
