import csv
import re
from pathlib import Path

from matplotlib.colors import to_rgba
from PIL import Image

from randlora_pl.lab.bench import METHODS
from randlora_pl.lab.bench.report import (
    Point,
    Reading,
    bars,
    cells,
    curves,
    sweep_cells,
    write_csv,
    write_figure,
)
from randlora_pl.lab.bench.steps import Measured
from tests.docs.help import help_page
from tests.docs.pages import PAGES

FULL = Measured("full", "full fine-tuning", "", 1000, 2_000_000, 10**9, None, [0.1, 0.2, 0.4], [1e11] * 3)
OURS = Measured("randlora", "RandLoRA-6", "", 100, 30_000_000, 10**9, None, [0.05, 0.2, 0.2], [1e11] * 3)
NONE = Measured("peft-randlora", "PEFT RandLoRA-6", "peft is not installed")


def test_columns_without_figures_are_left_out() -> None:
    header, rows = cells([FULL, OURS, NONE])
    assert header == ["method", "trained", "ms a step", "of full", "saved MB", "GFLOP", "% of peak", ""]
    assert rows[0] == ["full fine-tuning", "1,000", "200 (100..400)", "", "2.00", "1.00", "5", ""]
    assert rows[1] == ["RandLoRA-6", "100", "200 (50.0..200)", "0.50 (0.50..1.00)", "30", "1.00", "5", ""]
    assert rows[2] == ["PEFT RandLoRA-6", "", "", "", "", "", "", "peft is not installed"]


def test_the_peers_of_peft_have_a_column() -> None:
    theirs = Measured("peft-randlora", "PEFT RandLoRA-6", "", 100, 1, 1, 5_000_000, [0.1, 0.1, 0.2], [1e11] * 3)
    header, rows = cells([FULL, OURS, theirs])
    assert "of PEFT's" in header and "GPU MB" in header
    assert rows[1][header.index("of PEFT's")] == "1.00 (0.50..2.00)"


def test_bars_are_drawn_and_a_method_has_its_own_color(tmp_path: Path) -> None:
    figure = bars("title", [FULL, OURS, NONE])
    write_figure(figure, tmp_path / "bench.png")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["full fine-tuning", "RandLoRA-6"]
    assert [text.get_text() for text in figure.axes[0].texts] == [" 0.50"]
    assert Image.open(tmp_path / "bench.png").size[0] > 1000
    write_figure(bars("nothing", [NONE]), tmp_path / "empty.png")
    both = [patch.get_facecolor() for patch in bars("both", [FULL, OURS]).axes[0].patches]
    (alone,) = bars("one", [OURS]).axes[0].patches
    (line,) = curves("one", [Reading("depth", Point(), [OURS])]).axes[1].lines
    assert both[0] != both[1] == alone.get_facecolor() == to_rgba(line.get_color())
    every = [Measured(name, name, seconds=[0.1], rates=[1e11]) for name in METHODS]
    assert len({patch.get_facecolor() for patch in bars("every", every).axes[0].patches}) == len(METHODS)


def test_a_sweep_is_a_table_and_a_curve(tmp_path: Path) -> None:
    readings = [
        Reading("rank", Point(rank=rank), [FULL, Measured(**(vars(OURS) | {"label": f"RandLoRA-{rank}"})), NONE])
        for rank in (6, 12)
    ] + [Reading("depth", Point(depth=3), [FULL])]
    header, rows = sweep_cells(readings, "rank")
    assert header == ["rank", "bases", "full fine-tuning", "RandLoRA", "PEFT RandLoRA-6"]
    assert rows[0] == ["6", "128", "200 ms, 2.00 MB", "200 ms, 0.50, 30 MB", "peft is not installed"]
    figure = curves("title", readings)
    assert [panel.get_xlabel() for panel in figure.axes] == ["number of bases", "depth"] * 2
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["64", "128"]
    write_figure(figure, tmp_path / "bench.png")
    write_csv([row for reading in readings for row in reading.as_rows()], tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == 7 and found[1]["bases"] == "128" and float(found[1]["seconds_median"]) == 0.2
    write_figure(curves("nothing", []), tmp_path / "empty.png")
    every = [Measured(name, name, seconds=[0.1], rates=[1e11]) for name in METHODS]
    (panel, _) = curves("every method", [Reading("depth", Point(), every)]).axes
    assert len(panel.containers) == len(METHODS)


def test_the_switches_are_options_of_fit_and_the_figures_name_their_machine() -> None:
    shown = help_page("fit")
    for page in (PAGES["docs/speed.md"], PAGES["docs/measurements.md"]):
        assert all(option in shown for option in re.findall(r"--model\.(\w+)", page)) and "AMD EPYC" in page
