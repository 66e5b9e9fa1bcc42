import sys
from pathlib import Path

import pytest

from tests.faults.checks import FIT, run_of
from tests.faults.child import run

if sys.platform == "win32":
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder are `faults`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `FIT` to which nothing happened."""
    place = tmp_path_factory.mktemp("undisturbed")
    ended = run(FIT, place)
    assert ended.code == 0, ended.err
    return run_of(place)
