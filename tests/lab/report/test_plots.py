"""Figures: nothing overlaps, nothing is cut off, nothing is empty, every colour can be seen."""

import io
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from randlora_pl.lab.report import Picture
from randlora_pl.lab.report.accuracy import Beside
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.comparisons import Reference, comparisons, references
from randlora_pl.lab.report.files import draw
from randlora_pl.lab.report.plots import (
    COLOURS,
    INK,
    difference_picture,
    memory_picture,
    parameter_picture,
)
from tests.lab.report.sweeps import MODELS, description, write_sweep
from tests.support.browser import contrast
from tests.support.products import in_one_item

B32, L14 = "CLIP-ViT-B/32", "CLIP-ViT-L/14"
LONG = "LoRA of all ranks (matched to RandLoRA-6)"
FEW: dict[str, Any] = {"models": {B32: {}}, "datasets": ["cars", "dtd"], "budgets": [1], "seeds": [1]}


def compared(sweep: Sweep, model: str = B32) -> Reference:
    return next(one for one in references(sweep, comparisons(sweep)) if one.model == model)


def drawn(sweep: Sweep, model: str = B32) -> Picture:
    return difference_picture(sweep, Beside(sweep.plan), compared(sweep, model))


def words(figure: Figure) -> list[Text]:
    FigureCanvasAgg(figure).draw()
    hidden = {id(label) for axes in figure.axes for label in _outside(axes)}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in found if id(text) not in hidden]


def _outside(axes: Axes) -> list[Text]:
    """Labels of ticks that lie outside the panel, and are not drawn."""
    out = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                out += [tick.label1, tick.label2]
    return out


def check(picture: Picture | None) -> Figure:
    assert picture is not None and isinstance(picture.figure, Figure)
    figure = picture.figure
    shown = words(figure)
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    for (one, first), (other, second) in combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across <= 0.5 or down <= 0.5, f"{one!r} and {other!r} overlap"
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, (
            f"{text!r} is cut off"
        )
    pixels = np.asarray(Image.open(io.BytesIO(draw(figure, "png", "x"))).convert("RGB"), dtype=float)
    scale = pixels.shape[1] / figure.bbox.width
    for axes in figure.axes:
        box = axes.get_window_extent()
        top, bottom = pixels.shape[0] - scale * box.y1, pixels.shape[0] - scale * box.y0
        panel = pixels[int(top) : int(bottom), int(scale * box.x0) : int(scale * box.x1)]
        coloured = (panel.max(2) - panel.min(2) > 40).mean()  # grid and axes are grey
        assert coloured > 0.0002, "a panel is empty"  # a single point is a few hundred pixels
    return figure


@pytest.mark.parametrize(("model", "memory"), [(B32, "7.30 GB"), pytest.param(L14, "21.90 GB", marks=pytest.mark.full)])
def test_figures_of_a_whole_sweep(sweep: Sweep, model: str, memory: str) -> None:
    picture = drawn(sweep, model)
    figure = check(picture)
    assert len(figure.axes) == 1 and "over 5 datasets" in picture.caption
    assert "difference to LoRA-32, points" in [word.get_text() for word in words(figure)]
    estimate = compared(sweep, model).pairs["RandLoRA-6"].of_budget("1-shot")
    assert estimate is not None and f"RandLoRA-6 1-shot {estimate.mean:+.1f} ± {estimate.half:.1f}" in picture.described
    used = memory_picture(sweep, model)
    check(used)
    assert used is not None and f"LoRA-32 {memory}" in used.described
    picture = parameter_picture(sweep, "CLIP", [B32, L14])
    figure = check(picture)
    assert figure.axes[0].get_xscale() == "log"
    assert {"1M", "10M", "100M"} <= {word.get_text() for word in words(figure)}
    assert picture is not None and "CLIP-ViT-B/32 RandLoRA-6: 5,170,320 parameters" in picture.described


def test_points_are_the_differences(sweep: Sweep) -> None:
    axes: Any = drawn(sweep).figure.axes[0]  # type: ignore[attr-defined]
    pairs = compared(sweep).pairs
    assert list(pairs) == ["NoLA", "VeRA-256", "LoRA-16", "RandLoRA-6", "full fine-tuning"]
    assert [container.get_label() for container in axes.containers] == sweep.trained_budgets(B32)
    for container in axes.containers:
        found = [one.of_budget(container.get_label()) for one in pairs.values()]
        assert list(container.lines[0].get_xdata()) == pytest.approx([e.mean for e in found if e])
        (bars,) = container.lines[2]
        halves = [(piece[1][0] - piece[0][0]) / 2 for piece in bars.get_segments()]
        assert halves == pytest.approx([e.half for e in found if e])
    hollow = [line for line in axes.get_lines() if line.get_fillstyle() == "none" and len(line.get_xdata())]
    assert len(hollow) == 4 * 4  # the paper has no LoRA-16
    paper = Beside(sweep.plan)
    shared = [dataset for dataset, budget in pairs["NoLA"].cells if budget == "1-shot"]
    nola, lora = (paper.average(B32, "1-shot", method, shared) for method in ("NoLA", "LoRA-32"))
    assert nola and lora and hollow[0].get_xdata()[0] == pytest.approx(nola.value - lora.value)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"methods": {f"method {n}": {} for n in range(14)}}, marks=pytest.mark.full),
        {"methods": {LONG: {}, f"{LONG}, again": {}, "RandLoRA-6": {}}},
        pytest.param({"models": {f"family-model-with-a-long-name-{n}": {} for n in range(5)}}, marks=pytest.mark.full),
        {"seeds": [1], "budgets": [1], "datasets": ["cars"], "methods": {"RandLoRA-6": {}}, "models": {B32: {}}},
        pytest.param({"budgets": [1, 2, 4, 16, "50%", "100%"]}, marks=pytest.mark.full),
    ],
    ids=["many methods", "long names", "many models", "one cell", "six budgets"],
)
def test_nothing_overlaps(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = description(**({"datasets": ["cars", "dtd"], "seeds": [1, 2]} | changes))
    sizes = {method: 1000 * (n + 1) ** 3 for n, method in enumerate(content["methods"])}
    made = write_sweep(tmp_path, content, more=lambda labels: {"trainable_parameters": sizes.get(labels["method"], 0)})
    sweep = read_sweep(made)
    models = list(content["models"])
    if len(content["methods"]) > 1:
        check(drawn(sweep, models[0]))
    check(memory_picture(sweep, models[0]))
    check(parameter_picture(sweep, sweep.family(models[0]), models))


def test_lines_join_the_ranks_of_an_adapter(tmp_path: Path) -> None:
    kinds = dict.fromkeys(("LoRA-2", "LoRA-16", "LoRA (matched to RandLoRA-6)"), "LoRA")
    kinds |= {"RandLoRA-6": "RandLoRA", "RandLoRA-a": "RandLoRA", "RandLoRA-6 hadamard": "RandLoRA"}
    sizes = {name: 1000 * (n + 1) for n, name in enumerate(kinds)}

    def more(cell: dict[str, Any]) -> dict[str, Any]:
        return {"method": kinds.get(cell["method"], ""), "trainable_parameters": sizes.get(cell["method"], 0)}

    content = description(**FEW, methods={name: {} for name in kinds})
    figure = check(parameter_picture(read_sweep(write_sweep(tmp_path, content, more=more)), "CLIP", [B32]))
    lines = [list(line.get_xdata()) for line in figure.axes[0].get_lines() if line.get_linestyle() == "-"]  # type: ignore[arg-type]
    assert [1000, 2000, 3000] in lines and [4000] in lines and [5000] in lines and [6000] in lines


@pytest.mark.parametrize(("datasets", "bars"), [(["cars"], 0), (["cars", "dtd"], 5 * 2)])
def test_one_value_has_no_bar(tmp_path: Path, datasets: list[str], bars: int) -> None:
    """Of one dataset with one seed; two datasets have an interval over them."""
    sweep = read_sweep(write_sweep(tmp_path, description(**FEW | {"budgets": [1, 4], "datasets": datasets})))
    picture = drawn(sweep)
    axes: Any = check(picture).axes[0]
    segments = [piece for container in axes.containers for bars in container.lines[2] for piece in bars.get_segments()]
    assert sum(bool(piece.size and np.isfinite(piece).all()) for piece in segments) == bars
    assert ("over seeds" in picture.caption) == (not bars)


def test_nearly_equal_sizes_are_drawn_side_by_side(tmp_path: Path) -> None:
    sizes = {"LoRA-32": 1000, "RandLoRA-6": 1050, "NoLA": 5000}
    content = description(**FEW, methods={name: {} for name in sizes})
    made = write_sweep(tmp_path, content, more=lambda cell: {"trainable_parameters": sizes.get(cell["method"], 0)})
    axes: Any = check(parameter_picture(read_sweep(made), "CLIP", [B32])).axes[0]
    at = {container.get_label(): container.lines[0].get_xdata()[0] for container in axes.containers}
    assert at["NoLA"] == 5000 and 1.1 < at["RandLoRA-6"] / at["LoRA-32"] < 1.2
    assert 900 < at["LoRA-32"] < 1000 < at["RandLoRA-6"] < 1100


def test_memory_is_that_of_gpus_and_nothing_in_common_is_no_figure(tmp_path: Path) -> None:
    """On a CPU the process itself takes most of it; what was not measured has no bar."""
    few = description(**FEW)
    none = {"peak_memory_bytes": 0}
    made = write_sweep(tmp_path / "some", few, more=lambda cell: none if cell["method"] == "NoLA" else {})
    picture = memory_picture(read_sweep(made), B32)
    check(picture)
    assert picture is not None and "NoLA" not in picture.described and "VeRA-256 7.00 GB" in picture.described
    apart = {"LoRA-32": "cars", "RandLoRA-6": "dtd"}
    keep = lambda cell: apart.get(cell["method"]) == cell["dataset"]  # noqa: E731
    sweep = read_sweep(write_sweep(tmp_path / "apart", keep=keep, zeroshot=False))
    assert references(sweep, comparisons(sweep)) == [] and parameter_picture(sweep, "CLIP", list(MODELS)) is None
    for name, figures in (("none", none), ("cpu", {"device": "cpu"})):
        made = write_sweep(tmp_path / name, few, more=lambda labels, figures=figures: figures)  # type: ignore[misc]
        assert memory_picture(read_sweep(made), B32) is None


@in_one_item("colour", [*COLOURS, INK])
@in_one_item("page", ["#ffffff", "#16181d"])
def test_every_colour_is_seen_on_light_and_dark(colour: str, page: str) -> None:
    assert contrast(bytes.fromhex(colour[1:]), bytes.fromhex(page[1:])) >= 3
