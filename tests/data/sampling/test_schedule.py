import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.data.loader import DrawPlan, EvalSchedule, TrainSchedule, samples_drawn
from tests.support.products import in_one_item

sizes = st.integers(1, 60)


@in_one_item(
    ("dataset", "train", "classes", "epochs", "full", "half", "shots"),
    [  # protocol: optimizer steps at batch 128 for 100 %, 50 %, and 1, 2, 4, 16 images of each class
        ("Cars", 8_144, 196, 35, 2227, 1114, (108, 123, 123, 245)),
        ("DTD", 3_760, 47, 76, 2233, 1117, (103, 103, 103, 118)),
        ("EuroSAT", 21_600, 10, 13, 2194, 1097, (101, 102, 104, 113)),
        ("GTSRB", 26_640, 43, 11, 2290, 1145, (101, 101, 108, 108)),
        ("MNIST", 60_000, 10, 5, 2344, 1172, (101, 102, 104, 113)),
        ("SUN397", 19_850, 397, 14, 2172, 1086, (125, 125, 125, 497)),
        ("ImageNet", 1_281_167, 1000, 10, 100_092, 50_046, (157, 157, 313, 1250)),
        ("Caltech256", 24_485, 257, 8, 1531, 766, (101, 121, 161, 322)),
        ("Flowers102", 1_020, 102, 40, 319, 160, (104, 112, 128, 160)),
        ("Country211", 31_650, 211, 15, 3709, 1855, (116, 132, 132, 264)),
    ],
)
def test_steps_of_the_paper(
    dataset: str, train: int, classes: int, epochs: int, full: int, half: int, shots: tuple[int, ...]
) -> None:
    def steps(samples: int, epochs: int, least: int = 0) -> int:
        return DrawPlan(samples, samples_drawn(samples, epochs, 128, least), 128).steps

    assert steps(train, epochs) == full
    assert steps(train // 2, epochs) == half
    per_class = 10 if dataset == "Flowers102" else 16  # Flowers102 has no more than ten of a class
    counts = [classes, 2 * classes, 4 * classes, per_class * classes]
    assert tuple(steps(count, 10, 10) for count in counts) == shots


@given(sizes, st.integers(1, 5), sizes, st.integers(0, 12))
def test_short_epochs_are_extended(samples: int, epochs: int, global_batch: int, least: int) -> None:
    total = samples_drawn(samples, epochs, global_batch, least)
    assert total % (samples * epochs) == 0
    repeats = total // (samples * epochs)
    assert samples * repeats >= least * global_batch or (repeats == 1 and samples >= least * global_batch)
    assert repeats == 1 or samples * (repeats - 1) <= least * global_batch  # no more than needed


@given(sizes, sizes, st.integers(0, 2**40), st.sampled_from(("with_replacement", "epochs")))
def test_samples_are_pure_and_in_range(samples: int, total: int, seed: int, sampling: str) -> None:
    plan = DrawPlan(samples, total, 7, seed, sampling)
    numbers = torch.arange(total)
    drawn = plan.samples(numbers)
    assert drawn.min() >= 0 and drawn.max() < samples
    assert torch.equal(plan.samples(numbers.flip(0)), drawn.flip(0))
    assert torch.equal(torch.cat([plan.samples(plan.step_positions(step)) for step in range(plan.steps)]), drawn)


@given(sizes, st.integers(1, 4), st.integers(0, 99))
def test_epochs_are_permutations(samples: int, epochs: int, seed: int) -> None:
    drawn = DrawPlan(samples, samples * epochs, 7, seed, "epochs").samples(torch.arange(samples * epochs))
    for epoch in drawn.view(epochs, samples):
        assert epoch.sort().values.tolist() == list(range(samples))


def test_epochs_differ_from_each_other_and_between_seeds() -> None:
    first = DrawPlan(50, 100, 7, 0, "epochs").samples(torch.arange(100))
    other = DrawPlan(50, 100, 7, 1, "epochs").samples(torch.arange(100))
    assert not torch.equal(first[:50], first[50:]) and not torch.equal(first, other)


def test_with_replacement_is_uniform() -> None:
    counts = torch.bincount(DrawPlan(10, 100_000, 128, 3).samples(torch.arange(100_000)), minlength=10)
    chi2 = ((counts - 10_000) ** 2 / 10_000).sum().item()
    assert chi2 < 27.9  # 99.9 % quantile of chi-squared with 9 degrees of freedom


layouts = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 150))


def schedules(layout: tuple[int, int, int, int]) -> list[TrainSchedule]:
    batch, accumulate, world, total = layout
    plan = DrawPlan(17, total, batch * accumulate * world)
    return [TrainSchedule(plan, batch, accumulate, world, rank) for rank in range(world)]


@given(layouts)
def test_every_position_once_in_its_step(layout: tuple[int, int, int, int]) -> None:
    batch, accumulate, world, total = layout
    ranks = schedules(layout)
    assert len({len(schedule) for schedule in ranks}) == 1
    seen: dict[int, list[int]] = {}
    for schedule in ranks:
        for number in range(len(schedule)):
            micro_batch = schedule[number]
            assert micro_batch.index == number % accumulate and micro_batch.index < micro_batch.count
            assert 1 <= len(micro_batch.positions) <= batch
            assert len(micro_batch.positions) == len(ranks[0][number].positions)
            seen.setdefault(number // accumulate, []).extend(micro_batch.positions[micro_batch.weights > 0].tolist())
    plan = ranks[0].plan
    assert sorted(seen) == list(range(plan.steps))
    for step, found in seen.items():
        assert sorted(found) == plan.step_positions(step).tolist()
    assert sum(map(len, seen.values())) == total
    last = total - (plan.steps - 1) * plan.global_batch
    assert len(ranks[0]) == (plan.steps - 1) * accumulate + math.ceil(last / (batch * world))


@given(layouts)
def test_weights_make_the_mean_of_the_step(layout: tuple[int, int, int, int]) -> None:
    """Lightning divides each micro-batch by the accumulation, DDP averages over the ranks."""
    _, accumulate, world, _ = layout
    ranks = schedules(layout)
    loss = torch.linspace(1, 2, ranks[0].plan.samples_drawn, dtype=torch.float64)
    sums = torch.zeros(ranks[0].plan.steps, dtype=torch.float64)
    for schedule in ranks:
        for number in range(len(schedule)):
            micro_batch = schedule[number]
            part = (micro_batch.weights.double() * loss[micro_batch.positions]).sum()
            sums[number // accumulate] += part / accumulate / world
    means = torch.stack([loss[ranks[0].plan.step_positions(step)].mean() for step in range(len(sums))])
    torch.testing.assert_close(sums, means, rtol=1e-6, atol=0)


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_counts_every_sample_once(samples: int, batch: int, world: int) -> None:
    ranks = [EvalSchedule(samples, batch, world, rank) for rank in range(world)]
    found: list[int] = []
    for schedule in ranks:
        assert len(schedule) == math.ceil(samples / (batch * world))
        for number in range(len(schedule)):
            places, weights = schedule[number]
            assert len(places) == len(weights) <= batch and places.max() < samples
            assert set(weights.tolist()) <= {0.0, 1.0}
            found += places[weights > 0].tolist()
    assert sorted(found) == list(range(samples))
