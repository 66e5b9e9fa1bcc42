"""What a package index, a citation and the workflows say is what the project says."""

import re
import shutil
import tomllib
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import hatchling.build
import pytest
import yaml

from randlora_pl import __version__
from tests.docs.pages import PAGES, ROOT, links_of

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").iterdir()}
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))


def built(repository: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The metadata of the package of a repository."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", "src/randlora_pl/utils/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    setting = f'repository = "{repository}"'
    text, places = re.subn(r'^repository = ".*"$', setting, (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert places == 1
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    (folder / "made").mkdir()
    made = hatchling.build.prepare_metadata_for_build_wheel(str(folder / "made"))
    return PathDistribution(folder / "made" / made).metadata.json


def addresses_of(page: str) -> list[str]:
    return [*links_of(page), *re.findall(r'(?:src|srcset)="([^"]*)"', page)]


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```\w+\n(.*?)```", page, flags=re.S)


def test_page_of_a_published_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, readme = "https://example.org/owner/randlora-pl", PAGES["README.md"]
    made = built(f"{home}/", tmp_path, monkeypatch)
    places = [*(url.partition(", ")[2] for url in made["project_url"]), *addresses_of(made["description"])]
    assert len(places) == len(made["project_url"]) + len(addresses_of(readme)) and home in places
    files = [place.removeprefix(home) for place in places if place.startswith(f"{home}/")]
    assert len(files) > 30 and files.count("/issues") == 1
    for file in {file for file in files if file != "/issues"}:
        kind, path = re.fullmatch(rf"/(raw|blob)/v{re.escape(__version__)}/([^#]+)(?:#.*)?", file).groups()  # type: ignore[union-attr]
        assert (ROOT / path).is_file() and (kind == "raw") == path.endswith(".svg"), file
    assert {place.partition(":")[0] for place in places if place[0] != "#"} == {"https"}
    clone = f"git clone --branch v{__version__} {home} randlora-pl\ncd randlora-pl\n"
    changed = {"install . ": "install randlora-pl ", '".[language': '"randlora-pl[language', "docs/ferry": "CHATS"}
    *blocks, tests = blocks_of(readme)
    for old, new in changed.items():
        assert any(old in block for block in blocks)
        blocks = [block.replace(old, new) for block in blocks]
    assert blocks_of(made["description"]) == [*blocks, clone + tests]
    assert "checkout" not in made["description"] and '`pip install "randlora-pl[' in made["description"]


def test_page_of_a_package_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built("", tmp_path, monkeypatch)
    known = [place for place in addresses_of(PAGES["README.md"]) if place.startswith(("https:", "#"))]
    assert "project_url" not in made and known and addresses_of(made["description"]) == known
    assert "[Cite](#citation) · Contributing ·" in made["description"] and "<img" not in made["description"]
    assert blocks_of(made["description"]) == blocks_of(PAGES["README.md"])


def test_metadata() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["authors"] == PROJECT["authors"] == [{"name": "The randlora-pl contributors"}]
    assert (cited["version"], cited["license"]) == (__version__, PROJECT["license"])
    assert "2502.00987" in str(cited["references"]) and "https://arxiv.org/abs/2502.00987" in PAGES["README.md"]
    assert re.findall(r"^## (.*)", PAGES["CHANGELOG.md"], flags=re.M)[0] == __version__
    assert PYTHONS and PROJECT["requires-python"].startswith(f">={PYTHONS[0]}")


@pytest.mark.parametrize("name", ["docs", "publish", "tests"])
def test_workflow(name: str) -> None:
    text = WORKFLOWS[name].read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert set(WORKFLOWS) == {"docs", "publish", "tests"} and workflow["permissions"] == {"contents": "read"}
    first, *others = workflow["jobs"].values()
    forks = " || github.event.pull_request.head.repo.fork" * (name == "tests")  # they cannot read variables
    assert first["if"] == f"contains(vars.WORKFLOWS, '{name}')" + forks and all("needs" in job for job in others)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    uses = re.findall(r"uses: (.*)", text)
    assert len(uses) == sum("uses" in step for step in steps)
    assert [use for use in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", use)] == []
    assert "secrets." not in text and "password" not in text
    runs = [step["run"] for step in steps if "run" in step]
    versions = {str(step["with"]["python-version"]) for step in steps if "python-version" in step.get("with", {})}
    if name == "tests":
        assert runs == [".ci/run"] and first["strategy"]["matrix"]["python"] == PYTHONS
    else:
        assert versions == {PYTHONS[0]}
        assert [job for job in (first, *others) if job.get("permissions", {}).get("id-token") == "write"] == others
    if name == "docs":
        head = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("site_name")[0]
        assert all(f"{run} " in head for run in runs)
