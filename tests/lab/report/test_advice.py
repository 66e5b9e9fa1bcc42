"""Which method to take: sentences on made-up runs of one dataset, and the page that shows them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randlora_pl.lab.report.advice import Contest, recommend
from randlora_pl.lab.report.cells import FINISHED, Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import csv_text, pack_bits
from tests.lab.report.sweeps import sweep_yaml
from tests.support.products import in_one_item

KINDS = {
    "linear probe": ("LinearProbe", 1_290, 9.0),
    "LoRA": ("LoRA", 19_000, 21.0),
    "HiRA": ("HiRA", 18_000, 25.0),
    "full fine-tuning": ("FullFineTuning", 1_500_000, 40.0),
}
PROBE, LORA, HIRA, FULL = KINDS
RATE = 0.01


def facts_of(kind: str) -> dict[str, Any]:
    if kind == "LinearProbe":
        return {"adapter": kind, "task": "LinearHeadTask", "head_learning_rate": RATE}
    return {"adapter": kind, "learning_rate": RATE}


def answers(accuracy: float, samples: int, seeds: int = 5, jitter: float = 0.0) -> np.ndarray:
    """Which test pictures each seed gets right, (seeds, samples): the easiest ones, with some luck at the limit."""
    luck = np.random.default_rng(0).normal(0, jitter, (seeds, samples)) if jitter else 0.0
    hard = np.random.default_rng(1).permutation(samples) + 0.5
    right: np.ndarray = (hard + luck)[None].reshape(-1, samples) < accuracy / 100 * samples
    return np.broadcast_to(right, (seeds, samples))


def made(
    folder: Path,
    runs: dict[str, np.ndarray],
    zero: float | None = None,
    failed: dict[str, str] | None = None,
    **changes: Any,
) -> Sweep:
    """A sweep by its table, as a report has it; rates are tuned, but for the methods of ``untuned``."""
    untuned, kinds = changes.pop("untuned", ()), KINDS | changes.pop("kinds", {})
    columns = ["model", "dataset", "budget", "method", "seed", "state", "reason", "accuracy", "zeroshot_accuracy"]
    columns += ["learning_rate", "adapter", "task", "trainable_parameters", "fit_seconds", "device", "test/right"]
    rows = []
    for method, right in runs.items():
        kind, size, seconds = kinds[method]
        rest = [RATE, kind, facts_of(kind).get("task", "VisionLanguageTask"), size, seconds, "cpu"]
        for seed, bits in enumerate(right, 1):
            scores = [100 * bits.mean(), zero]
            rows.append(["CLIP", "birds", "100%", method, seed, FINISHED, "", *scores, *rest, pack_bits(bits.tolist())])
    for method, reason in (failed or {}).items():
        rows.append(["CLIP", "birds", "100%", method, 1, "failed", reason, *[None] * 9])
    methods = {method: facts_of(kinds[method][0]) for method in [*runs, *(failed or {})]}
    entries = {
        name: {"method": facts, "chosen": {key: RATE for key in facts if key.endswith("rate")}, "tried": []}
        for name, facts in methods.items()
        if name not in untuned
    }
    models = {"CLIP": {"config": "clip_vitb32"}}
    tuned = {"finished": True, "split": "val", "monitor": "val/acc", "seeds": [9], "models": models, "methods": entries}
    content = {"models": models, "datasets": ["birds"], "budgets": ["100%"], "methods": methods, "tuned": tuned}
    folder.mkdir(parents=True, exist_ok=True)
    seeds = list(range(1, 1 + max(map(len, runs.values()))))
    (folder / "sweep.yaml").write_text(sweep_yaml(content | {"seeds": seeds} | changes))
    (folder / "cells.csv").write_text(csv_text([columns, *rows]))
    return read_sweep(folder)


def near(accuracy: float, samples: int = 4_000) -> np.ndarray:
    return answers(accuracy, samples, jitter=4)


def few(accuracy: float, seeds: int = 5) -> np.ndarray:
    return answers(accuracy, 360, seeds, jitter=4)


def changed(right: np.ndarray, gained: int, lost: int) -> np.ndarray:
    """The same answers but for some pictures that no seed had right, and some that each had."""
    right, never, always = right.copy(), ~right.any(0), right.all(0)
    right[:, never.nonzero()[0][:gained]] = True
    right[:, always.nonzero()[0][:lost]] = False
    return right


def alone(*numbers: int) -> np.ndarray:
    """Right answers on these of 1,000 test pictures and on the last 900."""
    right = np.arange(1_000) >= 100
    right[list(numbers)] = True
    return np.stack([right] * 5)


MEND = "Train for more steps, or take it as it is."
TODAY = " If it must be one today, take the linear probe, the simpler one."
CASES: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "probe wins": (
        {FULL: near(91.6), LORA: near(92.2), HIRA: near(91.9), PROBE: near(92.1)},
        {"zero": 60},
        "Take the linear probe: nothing else is better by more than 0.3 points. | "
        "On 4,000 test pictures, the linear probe has 92.1 %, the mean of 5 seeds. That holds for new pictures of this "
        "kind. | Shown to be better, but by less than the margin of 1 point: LoRA.",
    ),
    "probe wins by far": (
        {PROBE: near(93), LORA: near(90)},
        {"failed": {HIRA: "out of memory"}},
        "Take the linear probe: it is better than every other method. | On 4,000 test pictures, the linear probe has "
        "93.0 %, the mean of 5 seeds. That holds for new pictures of this kind. | "
        "Left out, without a result: HiRA (failed: out of memory).",
    ),
    "full fine-tuning wins": (
        {PROBE: near(82.1), LORA: near(92.2), HIRA: near(91.9), FULL: near(95.4)},
        {"zero": 60},
        "Take full fine-tuning: it is 3.2 ± 0.7 points better than LoRA, the best of the simpler ones. "
        "| On 4,000 test pictures, full fine-tuning has 95.4 %, the mean of 5 seeds.",
    ),
    "an adapter wins": (
        {PROBE: near(82.1), LORA: near(92.2), HIRA: near(88.0), FULL: near(92.5)},
        {},
        "Take LoRA: it is 10.1 ± 1.1 points better than the linear probe, the simpler one, and nothing else is better "
        "than it by more than 0.5 points.",
    ),
    "two methods": (
        {PROBE: near(90), LORA: near(93)},
        {},
        "Take LoRA: it is 3.0 ± 0.5 points better than the linear probe, the simpler one. | On 4,000",
    ),
    "about equal size, so the faster one is simpler": (
        {HIRA: near(92), LORA: near(92.2)},
        {},
        "Take LoRA: it is better than every other method.",
    ),
    "undecided by pictures": (
        {PROBE: few(90), LORA: changed(few(90), gained=18, lost=15)},
        {},
        "Undecided: LoRA against the linear probe is +0.8 points, and -2.3 to +4.0 are possible with 360 test "
        f"pictures and 5 seeds.{TODAY} | On 360 test pictures, the linear probe has 90.1 %, the mean of 5 seeds. That "
        "holds for new pictures of this kind. | About 5,100 test pictures would decide it",
    ),
    "undecided by the choice of seeds": (
        {PROBE: near(90), LORA: np.concatenate([answers(each, 4_000, 1) for each in (88.5, 91, 89.3, 92, 90)])},
        {},
        "Undecided: LoRA against the linear probe is +0.2 points, and -1.5 to +1.9 are possible with 4,000 test "
        f"pictures and 5 seeds.{TODAY} | On 4,000 test pictures, the linear probe has 90.0 %, the mean of 5 seeds. "
        "That holds for new pictures of this kind. | About 22 seeds would decide it, if the difference stays the same.",
    ),
    "undecided by both": (
        {
            PROBE: few(90),
            LORA: np.concatenate([changed(answers(each, 360, 1), 30, 20) for each in (86, 94, 88, 95, 89)]),
        },
        {},
        "Undecided: LoRA against the linear probe is +2.0 points, and -2.3 to +6.3 are possible with 360 test "
        f"pictures and 5 seeds.{TODAY} | On 360 test pictures, the linear probe has 90.1 %, the mean of 5 seeds. That "
        "holds for new pictures of this kind. | About 1,600 test pictures and 23 seeds would decide it",
    ),
    "undecided by seeds": (
        {PROBE: few(90, 3), LORA: few(93, 3)},
        {},
        f"Undecided: LoRA against the linear probe is +2.7 points, without a verdict (3 seeds, 5 are needed).{TODAY}",
    ),
    "undecided by an untuned rate": (
        {PROBE: near(90), LORA: near(93)},
        {"untuned": [LORA]},
        "Undecided: LoRA against the linear probe is +3.0 points, without a verdict (not tuned: linear probe "
        f"validation, LoRA typed).{TODAY} | On",
    ),
    "few differing": (
        {PROBE: alone(), LORA: alone(1, 2, 3, 4, 5)},
        {},
        "Undecided: LoRA against the linear probe is +0.5 points, and -1.2 to +1.2 are possible with 1,000 test "
        f"pictures and 5 seeds.{TODAY} | On 1,000 test pictures, the linear probe has 90.0 %, the mean of 5 seeds. "
        "That holds for new pictures of this kind. | About 1,300 test pictures would decide it,",
    ),
    "one method": (
        {PROBE: near(90)},
        {"failed": {LORA: "the loss is not finite"}},
        "Undecided: no other method has a result of the same seed to compare the linear probe with. | On the test "
        "pictures, the linear probe has 90.0 %, the mean of 5 seeds. That holds for new pictures of this kind. | Left "
        "out, without a result: LoRA (failed: the loss is not finite).",
    ),
    "idle": (
        {PROBE: near(90), LORA: near(90.1)},
        {"zero": 90.05},
        "Take the linear probe: nothing else is better by more than 0.2 points. But no method is shown to differ from "
        f"the pretrained model (90.0 %). {MEND}",
    ),
    "the winner is idle": (
        {PROBE: near(90), LORA: near(85)},
        {"zero": 90},
        "Take the linear probe: it is better than every other method. But the linear probe is not shown to differ "
        f"from the pretrained model (90.0 %). {MEND}",
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


@settings(max_examples=6, deadline=None)
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
    found, place = contest.advice(), contest.order.index(contest.winner)
    assert sorted(contest.order) == sorted(runs)
    assert contest.regret(found.winner) >= 0
    for method in contest.order:
        gains = {other: contest.most(other, method) for other in contest.others(method)}
        beaten = any(contest.better(other, method) and most > margin for other, most in gains.items())
        assert beaten if contest.order.index(method) < place else not beaten or method != found.winner
    wins = all(contest.better(found.winner, other) for other in contest.others(found.winner))
    assert found.decided == (wins or contest.regret(found.winner) <= margin)
    assert contest.order.index(recommend(sweep, margin + 1).winner) <= place, "a wider margin takes a simpler method"

    names = dict(zip(runs, "cdba", strict=False))  # other labels in another order
    kinds = {name: KINDS[method] for method, name in names.items()}
    turned = {names[method]: runs[method] for method in sorted(names, key=names.__getitem__)}
    other = Contest(made(tmp_path_factory.mktemp("again"), turned, kinds=kinds), margin)
    assert other.order == [names[method] for method in contest.order]
    again = other.advice()
    assert (again.winner, again.decided) == (names[found.winner], found.decided)


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
