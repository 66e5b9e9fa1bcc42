import json
from pathlib import Path

import pytest
import yaml

from randlora_pl.sweep import SweepConfig
from randlora_pl.sweep.folder import DONE, FAILED, OPEN, SweepFolder
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import atomic_file
from tests.sweep.grids import GRID, cells_of


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path / "sweep")


def test_states_of_a_cell(folder: SweepFolder) -> None:
    cell = cells_of()[0]
    assert folder.state(cell) == OPEN and folder.results(cell) == {}
    place = folder.begin(cell)
    assert json.loads((place / "cell.json").read_text()) == cell.labels._asdict() | {"config": cell.flat}
    (place / "results.json").write_text("{")
    assert folder.state(cell) == OPEN, "damaged"
    (place / "results.json").write_text('{"test/acc": 0.5, "finished": false}')
    assert folder.state(cell) == OPEN, "broken off"
    folder.fail(cell, "two\nlines")
    folder.fail(cell, "again", "Traceback ...")
    told = json.loads((place / "failed.json").read_text())
    assert told.pop("time").startswith("20")
    assert told == {"reason": "again", "tries": 2, "traceback": "Traceback ..."}
    assert folder.state(cell) == FAILED
    (place / "results.json").write_text('{"finished": true}')
    assert folder.state(cell) == DONE


def test_a_finished_cell_keeps_what_it_needs(folder: SweepFolder) -> None:
    cell = cells_of()[0]
    place = folder.begin(cell)
    folder.fail(cell, "before")
    for name in ("checkpoints", "adapter"):
        (place / name).mkdir()
    folder.succeed(cell, keep_adapters=True)
    assert {path.name for path in place.iterdir()} == {"cell.json", "adapter"}
    folder.succeed(cell, keep_adapters=False)
    assert {path.name for path in place.iterdir()} == {"cell.json"}


def test_a_grid_may_grow_in_its_folder(folder: SweepFolder) -> None:
    small = cells_of()
    folder.open(SweepConfig.from_content(GRID), small)
    folder.begin(small[0])
    more = {"seeds": [2], "methods": GRID["methods"] | {"VeRA": {"adapter": "VeRA"}}}
    folder.open(SweepConfig.from_content(GRID | more), cells_of(**more))
    told = yaml.safe_load((folder.path / "sweep.yaml").read_text())
    assert told["seeds"] == [1, 2] and list(told["methods"]) == ["RandLoRA-6", "LoRA-4", "VeRA"]
    folder.open(SweepConfig.from_content(GRID), small)
    assert yaml.safe_load((folder.path / "sweep.yaml").read_text())["seeds"] == [1, 2], "it does not shrink"


def test_another_sweep_is_refused_with_what_differs(folder: SweepFolder) -> None:
    folder.open(SweepConfig.from_content(GRID), cells_of())
    folder.begin(cells_of()[1])
    other = {"methods": {"LoRA-4": {"adapter": "LoRA", "rank": 5}}}
    with pytest.raises(UserError) as error:
        folder.open(SweepConfig.from_content(GRID | other), cells_of(**other))
    assert "LoRA-4" in str(error.value)
    assert yaml.safe_load((folder.path / "sweep.yaml").read_text())["methods"] == GRID["methods"]
    (folder.path / "sweep.yaml").rename(folder.path / "thesis.tex")
    with pytest.raises(UserError, match="empty"):
        folder.open(SweepConfig.from_content(GRID), cells_of())


def test_cells_of_the_same_names_are_replaced_and_others_stay(folder: SweepFolder) -> None:
    first, second = cells_of()
    (other,) = cells_of(methods={first.labels.method: {"adapter": "LoRA", "learning_rate": 0.5}})
    places = [folder.begin(cell) for cell in (first, second)]
    (places[1] / "cell.json").write_text("{")
    with pytest.raises(UserError, match="holds another sweep"):
        folder.check([other], ["model.learning_rate"])
    (rated,) = cells_of(methods={first.labels.method: {"adapter": "RandLoRA", "rank": 6, "learning_rate": 0.5}})
    folder.check([rated], ["model.learning_rate"])
    folder.replace(SweepConfig.from_content(GRID), [first])
    one = SweepConfig.from_content(GRID | {"seeds": [7]})
    folder.replace(one, [first])
    assert all(map(Path.is_dir, places)), "the same, and a damaged one"
    assert folder.description() == one, "the seeds of the former one are left out"
    folder.replace(one, [rated])
    assert [place.is_dir() for place in places] == [False, True]


def test_a_second_process_may_begin_while_the_first_writes_the_description(folder: SweepFolder) -> None:
    folder.path.mkdir()
    with atomic_file(folder.path / "sweep.yaml") as first:
        folder.open(SweepConfig.from_content(GRID), cells_of())
        first.write((folder.path / "sweep.yaml").read_bytes())
    folder.open(SweepConfig.from_content(GRID), cells_of())


def test_a_damaged_description_is_told(folder: SweepFolder) -> None:
    folder.open(SweepConfig.from_content(GRID), cells_of())
    for damaged in ("models: [", "5", "[5]", "models"):
        (folder.path / "sweep.yaml").write_text(damaged)
        with pytest.raises(UserError, match="describe"):
            folder.open(SweepConfig.from_content(GRID), cells_of())
