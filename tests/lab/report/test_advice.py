"""Which method to take: sentences on made-up runs of one dataset, and the page that shows them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from randlora_pl.lab.report import markdown
from randlora_pl.lab.report.advice import build, confusion_table, methods_table, recommend, write
from randlora_pl.lab.report.contest import Contest
from randlora_pl.utils.errors import UserError
from tests.lab.report.advised import COMMANDS, FULL, HIRA, KINDS, LORA, PROBE, answers, changed, made, near, stored
from tests.lab.report.test_document import Page
from tests.support.products import in_one_item


def few(accuracy: float, seeds: int = 5) -> np.ndarray:
    return answers(accuracy, 360, seeds, jitter=4)


def alone(*numbers: int) -> np.ndarray:
    """Right answers on these of 1,000 test pictures and on the last 900."""
    right = np.arange(1_000) >= 100
    right[list(numbers)] = True
    return np.stack([right] * 5)


MEND = "Train for more steps, or take it as it is."
NEAR, BEST = ", the simplest one near the best here.", ", the best here."
TODAY = f" If it must be one today, take the linear probe{NEAR}"
CASES: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "probe wins": (
        {FULL: near(91.6), LORA: near(92.2), HIRA: near(91.9), PROBE: near(92.1)},
        {"zero": 60},
        "Take the linear probe: nothing else is better by more than 0.3 points. | "
        "On 4,000 test pictures, the linear probe has 92.1 %, the mean of 5 seeds. On new pictures of this kind, 91.2 "
        "to 92.9 % are possible. | Shown to be better, but by no more than the margin of 1: LoRA.",
    ),
    "probe wins by far": (
        {PROBE: near(93), LORA: near(90)},
        {"failed": {HIRA: "out of memory"}},
        "Take the linear probe: it is 3.0 ± 0.5 points better than LoRA. | On 4,000 test pictures, the linear probe "
        "has 93.0 %, the mean of 5 seeds. On new pictures of this kind, 92.2 to 93.8 % are possible. | "
        "Left out, without a result: HiRA (failed: out of memory).",
    ),
    "full fine-tuning wins": (
        {PROBE: near(82.1), LORA: near(92.2), HIRA: near(91.9), FULL: near(95.4)},
        {"zero": 60},
        "Take full fine-tuning: it is 3.2 ± 0.7 points better than LoRA, the best of the others. "
        "| On 4,000 test pictures, full fine-tuning has 95.4 %, the mean of 5 seeds.",
    ),
    "an adapter wins over two simpler ones": (
        {PROBE: near(82.1), HIRA: near(88), LORA: near(92.2), FULL: near(92.5)},
        {"kinds": {LORA: ("LoRA", 25_000, 21.0)}},
        "Take LoRA: it is 4.2 ± 0.7 points better than HiRA, the best of the simpler ones, and nothing else is better "
        "than it by more than 0.5 points.",
    ),
    "an adapter wins": (
        {PROBE: near(82.1), LORA: near(92.2), HIRA: near(88.0), FULL: near(92.5)},
        {},
        "Take LoRA: it is 10.1 ± 1.1 points better than the linear probe, and nothing else is better "
        "than it by more than 0.5 points.",
    ),
    "about equal size, so the faster one is simpler": (
        {HIRA: near(92), LORA: near(92.2)},
        {},
        "Take LoRA: it is 0.2 ± 0.1 points better than HiRA.",
    ),
    "a probe of many classes is simpler than a smaller adapter": (
        {LORA: near(92), PROBE: near(91.9)},
        {"kinds": {PROBE: ("LinearProbe", 500_000, 90.0)}},
        "Take the linear probe: nothing else is better by more than 0.2 points.",
    ),
    "undecided by pictures": (
        {PROBE: few(90), LORA: changed(few(90), gained=18, lost=15)},
        {},
        "Undecided: LoRA against the linear probe is +0.8 points, and -2.3 to +4.0 are possible with 360 test "
        f"pictures and 5 seeds.{TODAY} | On 360 test pictures, the linear probe has 90.1 %, the mean of 5 seeds. On "
        "new pictures of this kind, 86.4 to 92.7 % are possible.",
    ),
    "undecided by the choice of seeds": (
        {PROBE: near(90), LORA: np.concatenate([answers(each, 4_000, 1) for each in (88.5, 91, 89.3, 92, 90)])},
        {},
        "Undecided: LoRA against the linear probe is +0.2 points, and -1.5 to +1.9 are possible with 4,000 test "
        f"pictures and 5 seeds.{TODAY} | On 4,000 test pictures, the linear probe has 90.0 %,",
    ),
    "undecided by both": (
        {
            PROBE: few(90),
            LORA: np.concatenate([changed(answers(each, 360, 1), 30, 20) for each in (86, 94, 88, 95, 89)]),
        },
        {},
        "Undecided: LoRA against the linear probe is +2.0 points, and -2.3 to +6.3 are possible with 360 test pictures "
        f"and 5 seeds. If it must be one today, take LoRA{BEST} | On 360 test pictures, LoRA has 92.1 %, the mean of 5 "
        "seeds. On new pictures of this kind, 87.5 to 95.8 % are possible.",
    ),
    "undecided by seeds": (
        {PROBE: few(90, 3), LORA: few(93, 3)},
        {},
        "Undecided: LoRA against the linear probe is +2.7 points, without a verdict (3 seeds, 5 are needed). If it "
        f"must be one today, take LoRA{BEST} | On 360 test pictures, LoRA has 93.0 %,",
    ),
    "undecided by an untuned rate": (
        {PROBE: near(90), LORA: near(93)},
        {"untuned": [LORA]},
        "Undecided: LoRA against the linear probe is +3.0 points, without a verdict (the learning rates were not "
        f"searched alike). If it must be one today, take LoRA{BEST} | On",
    ),
    "undecided, and the best is hardly better than a simpler one": (
        {PROBE: few(80, 3), LORA: few(93, 3), HIRA: few(80, 3), FULL: few(93.5, 3)},
        {"untuned": [FULL]},
        "Undecided: full fine-tuning against the linear probe is +13.2 points, without a verdict (the learning rates "
        f"were not searched alike; 3 seeds, 5 are needed). If it must be one today, take LoRA{NEAR} | On",
    ),
    "few differing": (
        {PROBE: alone(), LORA: alone(1, 2, 3, 4, 5)},
        {},
        "Undecided: LoRA against the linear probe is +0.5 points, and -1.2 to +1.2 are possible with 1,000 test "
        f"pictures and 5 seeds.{TODAY} | On 1,000 test pictures, the linear probe has 90.0 %,",
    ),
    "one method": (
        {PROBE: near(90)},
        {"failed": {LORA: "the loss is not finite"}},
        "Undecided: no other method has a result of the same seed to compare the linear probe with. | On 4,000 test "
        "pictures, the linear probe has 90.0 %, the mean of 5 seeds. On new pictures of this kind, 89.0 to 90.9 % are "
        "possible. | Left out, without a result: LoRA (failed: the loss is not finite).",
    ),
    "a failed method may be better": (
        {PROBE: near(92.1), LORA: near(92.2)},
        {"failed": {HIRA: "out of memory"}},
        "Take the linear probe: nothing else with a result is better by more than 0.2 points. | On 4,000",
    ),
    "idle by the test pictures, although all seeds are equal": (
        {PROBE: few(93), LORA: few(80)},
        {"zero": 91},
        "Take the linear probe: it is 12.8 ± 3.3 points better than LoRA. But the linear probe is not shown to differ "
        f"from the pretrained model (91.0 %). {MEND}",
    ),
    "idle": (
        {PROBE: near(90), LORA: near(90.1)},
        {"zero": 90.05},
        "Take the linear probe: nothing else is better by more than 0.2 points. But the linear probe is not shown to "
        f"differ from the pretrained model (90.0 %). {MEND}",
    ),
    "training harms": (
        {PROBE: near(90), LORA: near(90.1)},
        {"zero": 95},
        "Take the linear probe: nothing else is better by more than 0.2 points. But the pretrained model has 95.0 %, "
        f"which is more. {MEND}",
    ),
}


@in_one_item(("name", "case"), CASES.items())
def test_recommendation(tmp_path: Path, name: str, case: Any) -> None:
    runs, changes, text = case
    found = recommend(made(tmp_path, runs, **changes), 1.0)
    assert " | ".join([found.sentence, *found.details]).startswith(text)
    assert found.decided == text.startswith("Take")
    assert found.winner in runs


VALUES = st.lists(st.sampled_from([88, 90, 90.5, 91, 94]), min_size=2, max_size=4)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1), VALUES, st.sampled_from([300, 3_000]), st.sampled_from([0.0, 0.5, 2.0]))
def test_a_recommendation_is_the_simplest_that_is_not_beaten(
    tmp_path_factory: pytest.TempPathFactory, seed: int, values: list[float], samples: int, margin: float
) -> None:
    rng = np.random.default_rng(seed)
    spread = rng.integers(1, 40)
    runs = {}
    for name, value in zip(rng.permutation(list(KINDS)), values, strict=False):
        right = answers(value, samples, jitter=4)
        runs[str(name)] = changed(right, int(rng.integers(spread)), int(rng.integers(spread)))
    sweep = made(tmp_path_factory.mktemp("sweep"), runs)
    contest = Contest(sweep, margin)
    assert sorted(contest.order) == sorted(runs)
    assert contest.regret >= 0
    left, means = [], {method: right.mean() * 100 for method, right in runs.items()}
    for method in contest.order:
        gains = {other: contest.most(other, method) for other in contest.others(method)}
        if not any(contest.better(other, method) and most > margin for other, most in gains.items()):
            left.append(method)
    assert contest.base == left[0], "each simpler method is beaten"
    wins = all(contest.better(contest.base, other) for other in contest.others(contest.base))
    assert contest.decided == (contest.regret <= margin)
    assert not wins or contest.regret == 0, "so that it is decided"
    today = [method for method in left if max(means[one] for one in left) - means[method] <= margin + 1e-9]
    assert contest.winner == (contest.base if contest.decided else today[0])
    place = contest.order.index(contest.winner)
    assert contest.order.index(recommend(sweep, margin + 1).winner) <= place, "a wider margin takes a simpler method"

    names = dict(zip(runs, "cdba", strict=False))  # other labels in another order
    kinds = {name: KINDS[method] for method, name in names.items()}
    turned = {names[method]: runs[method] for method in sorted(names, key=names.__getitem__)}
    other = Contest(made(tmp_path_factory.mktemp("again"), turned, kinds=kinds), margin)
    assert other.order == [names[method] for method in contest.order]
    assert (other.winner, other.decided) == (names[contest.winner], contest.decided)


@in_one_item(
    ("changes", "said"),
    [
        ({"budgets": [1, "100%"]}, "A recommendation is for one amount of data, and "),
        ({"datasets": ["birds", "fish"]}, "A recommendation is for one dataset, and "),
        ({"models": {"CLIP": {"config": "clip_vitb32"}, "tiny": {"config": "clip_vitb32"}}}, "is for one model, and "),
    ],
)
def test_other_sweeps_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recommend(made(tmp_path, {PROBE: few(90), LORA: few(90)}, **changes), 1.0)


def test_a_sweep_without_a_trained_method_is_refused(tmp_path: Path) -> None:
    runs, failed = {"zero-shot": few(90, 1)}, {LORA: "out of memory"}
    sweep = made(tmp_path, runs, failed=failed, kinds={"zero-shot": ("Frozen", 0, None)})
    with pytest.raises(UserError, match="No method has a result: LoRA failed: out of"):
        recommend(sweep, 1.0)


def test_a_method_is_better_if_its_interval_excludes_zero_too(tmp_path: Path) -> None:
    """Holm's last p may be 0.04, at which the interval for three pairs still reaches beyond zero."""
    best = answers(93, 4_000)
    runs = {PROBE: best, LORA: answers(80, 4_000), HIRA: answers(70, 4_000), FULL: changed(best, gained=40, lost=61)}
    contest = Contest(made(tmp_path, runs), 0.0)
    assert 0.03 < (contest.pairs[PROBE, FULL].p or 0) < 0.05 and 0 < contest.regret < 0.2
    assert not contest.better(PROBE, FULL) and contest.sentence.startswith(
        "Undecided: full fine-tuning against the linear probe is -0.5 points, and -1.1 to +0.1 are possible"
    )
    verdicts = {cells[0].text: cells[1].text for cells in methods_table(contest).rows}
    assert verdicts == {PROBE: "take it today", LORA: "worse", HIRA: "worse", FULL: "no difference found"}


def test_runs_without_a_result_are_counted(tmp_path: Path) -> None:
    """Seven seeds give a verdict without the two that failed, which may be the bad ones."""
    runs = {PROBE: answers(90, 4_000, 7, jitter=4), LORA: answers(93, 4_000, 5, jitter=4)}
    contest = recommend(made(tmp_path, runs), 1.0)
    assert contest.decided and contest.winner == LORA
    assert contest.details[-1] == "Left out, without a result: LoRA (2 of 7 runs)."


def test_the_interval_of_an_accuracy(tmp_path: Path) -> None:
    """Wilson's of 40 pictures, and Student's of the seeds where these differ more; never beyond 100 %."""
    same, full = [answers(value, 40) for value in (90, 100)]
    seeds = np.concatenate([answers(value, 40, 1) for value in (60, 95, 70, 90, 85)])
    contest = Contest(made(tmp_path, {PROBE: same, LORA: full, HIRA: seeds}), 1.0)
    z = 1.959964
    middle, half = (0.9 + z**2 / 80) / (1 + z**2 / 40), z / (1 + z**2 / 40) * (0.09 / 40 + z**2 / 6400) ** 0.5
    assert contest.interval(PROBE) == pytest.approx((100 * (middle - half), 100 * (middle + half)))
    low, high = contest.interval(LORA)
    assert high == 100 and low == pytest.approx(100 / (1 + z**2 / 40))
    assert contest.interval(HIRA)[0] < 80 - (contest.estimates[HIRA].half or 0) < 62.1


def test_the_interval_of_a_difference_is_wider_among_more_methods(tmp_path: Path) -> None:
    runs = {PROBE: few(90), LORA: changed(few(90), gained=18, lost=15), FULL: few(70)}
    pair = Contest(made(tmp_path, runs), 1.0).pairs[LORA, PROBE]
    assert pair.crossed
    for count in (1, 3):
        half = scipy.stats.t.isf(0.05 / 2 / count, pair.crossed.freedom) * pair.crossed.error
        assert pair.span(count) == pytest.approx((pair.crossed.mean - half, pair.crossed.mean + half))
    assert pair.span(1) == pytest.approx((pair.crossed.mean - pair.crossed.half, pair.crossed.mean + pair.crossed.half))


def test_the_interval_of_methods_that_hardly_differ_is_that_of_the_share_of_pictures(tmp_path: Path) -> None:
    """Clopper and Pearson's interval of 5 in 1,000, at the level of one and of three pairs; both signs are possible."""
    contest = Contest(made(tmp_path, {PROBE: alone(), LORA: alone(1, 2, 3, 4, 5)}), 1.0)
    pair = contest.pairs[LORA, PROBE]
    assert pair.alike and pair.p is None and pair.difference.mean == pytest.approx(0.5)
    for count in (1, 3):
        most = 100 * binomtest(5, 1_000).proportion_ci(1 - 0.05 / count, "exact").high
        assert pair.span(count) == pytest.approx((-most, most)) and pair.turned().span(count) == pair.span(count)


def test_page(tmp_path: Path) -> None:
    """Every part is there, in one file that needs nothing else."""
    runs = {PROBE: few(90), LORA: changed(few(90), gained=18, lost=15), HIRA: few(90.4), FULL: few(70)}
    sweep = stored(tmp_path / "sweep", runs, {"DoRA": "out of <memory>"}, ["<script>bird</script>", "robin & tit"])
    file = write(sweep, tmp_path / "new" / "page", 1.0, COMMANDS)
    assert file == tmp_path / "new/page/index.html"
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    sections = ["short", "methods", "train", "confusion", "training", "rates", "cost", "elsewhere"]
    assert [link[1:] for link in page.links[: len(sections) + 2]] == [*sections, "missing", "made"]
    assert not page.stack and not [tag for tag in ("link", "img", "iframe", "object") if page.tags[tag]]
    assert page.tags["svg"] == 2 and all(link.startswith("#") for link in page.links)
    assert not [value for _, name, value in page.attributes if name == "src"] and "@import" not in text
    assert "out of &lt;memory&gt;" in text and "&lt;script&gt;bird&lt;/script&gt;" in text
    assert "<script>bird" not in text and "robin &amp; tit" in text
    assert "CLIP: validation accuracy against steps." in text, "a probe has another loss, which is not drawn"
    contest = recommend(sweep, 1.0)
    assert contest.sentence in text
    table = methods_table(contest)
    rows = {cells[0].text: cells for cells in table.rows}
    assert list(rows) == [PROBE, LORA, HIRA, FULL, "pretrained model", "DoRA"], "the simplest first"
    assert {name: cells[1].text for name, cells in rows.items() if name in KINDS} == {
        PROBE: "take it today",
        LORA: "no difference found",
        HIRA: "no verdict",
        FULL: "worse",
    }
    low, high = contest.interval(LORA)
    assert [cell.text for cell in rows[LORA][2:]] == ["90.9", "+0.8", "19,000"]
    assert rows[LORA][2].below == f"{low:.1f} to {high:.1f}" and rows[LORA][3].below == "-3.0 to +4.7"
    assert rows["pretrained model"][2].text == "60.0" and rows["DoRA"][1].text == "failed"
    assert table.below[1:] == ["HiRA: no verdict: 4 test samples on which the methods differ, 10 are needed."]
    assert {len(cells) for cells in table.rows} == {len(table.header)}
    commands = text[text.index("<pre>") : text.index("</pre>")]
    assert commands.startswith(f"<pre># {PROBE}\n{COMMANDS[PROBE]}\n\n# "), "the winner first"
    assert all(command in commands for command in COMMANDS.values())
    assert write(sweep, file.parent, 1.0, COMMANDS).read_text(encoding="utf-8") == text, "replaces its own files"


def test_confusion_of_the_winner(tmp_path: Path) -> None:
    runs = {PROBE: few(93), LORA: few(90)}
    contest = Contest(stored(tmp_path / "few", runs, {}, ["a", "b", "c"]), 1.0)
    found = confusion_table(contest)
    assert found is not None and [cell.text for cell in found.header] == ["True class", "Pictures", "a", "b", "c"]
    for true, cells in enumerate(found.rows):
        shares = [cell.sort or 0 for cell in cells[2:]]
        assert sum(shares) == pytest.approx(100) and shares[true] == max(shares)
        assert all((cell.tint > 0) == (guess == true) for guess, cell in enumerate(cells[2:]))
    for file in (contest.sweep.folder / "cells").glob("*/figures/confusion.csv"):
        file.write_text("true/predicted,a\nb,x\n")
    assert confusion_table(contest) is None, "damaged files are left out"

    large = Contest(stored(tmp_path / "many", runs, {}, [f"class {number}" for number in range(30)]), 1.0)
    pairs = confusion_table(large)
    assert pairs is not None and len(pairs.rows) == 20
    assert all(cells[0].text != cells[1].text for cells in pairs.rows), "right answers are not confusions"
    percents = [cells[3].sort or 0 for cells in pairs.rows]
    assert min(percents) > 1.5 and max(percents) < 10


def test_page_of_few_facts(tmp_path: Path) -> None:
    """Without curves, confusion matrices, memory and commands: these parts are missing, not empty."""
    text = markdown(build(Contest(made(tmp_path, {PROBE: few(90), LORA: few(90)}), 1.0), {}))
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    last = "How this was made, and what it does not say"
    assert titles == ["In short", "All methods", "Learning rates", "Time and memory", last]
