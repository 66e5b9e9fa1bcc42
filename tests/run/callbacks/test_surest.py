import pytest
import torch
from torch import Tensor

from randlora_pl.run.callbacks.figures import Prediction, Surest, wrong_first


def predictions(samples: int = 40, classes: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(samples, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator).round()  # many are equally sure
    return images, torch.arange(samples), labels, logits, torch.rand(samples, generator=generator) > 0.2


def found(order: list[int], parts: int, most: int = 5) -> Surest:
    rows, surest = predictions(), Surest(most)
    for part in torch.tensor(order).tensor_split(parts):
        surest.add(*(column[part] for column in rows))
    return surest


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_surest_mistakes_are_those_of_the_whole_set(parts: int) -> None:
    images, _, labels, logits, counts = predictions()
    shares, guesses = logits.softmax(1).max(1)
    wrong = [place for place in range(40) if counts[place] and guesses[place] != labels[place]]
    wanted = sorted(wrong, key=lambda place: (-float(shares[place]), place))[:5]
    surest = found(list(range(40)), parts)
    assert [mistake.index for mistake in surest.mistakes] == wanted
    assert (surest.wrong, surest.seen) == (len(wrong), int(counts.sum()))
    for mistake in surest.mistakes:
        assert (mistake.label, mistake.guess) == (labels[mistake.index], guesses[mistake.index])
        assert torch.equal(mistake.image, images[mistake.index])
        assert mistake.image.untyped_storage().nbytes() == mistake.image.nbytes, "a view keeps its whole batch"


def test_wrong_predictions_come_first_and_leave_room_for_right_ones() -> None:
    def one(index: int, probability: float, wrong: bool = False) -> Prediction:
        return Prediction(probability, index, 0, int(wrong), torch.zeros(3, 1, 1))

    samples = [one(9, 0.5), one(1, 0.9), one(7, 0.4, wrong=True), one(2, 0.8), one(5, 0.99)]
    mistakes = [one(index, 0.9 - 0.1 * index, wrong=True) for index in (0, 3, 4, 6)]
    assert [kept.index for kept in wrong_first(mistakes, samples)] == [0, 3, 4, 1, 9], "half of five, rounded up"
    assert [kept.index for kept in wrong_first(mistakes[:1], samples)] == [0, 7, 1, 2, 9]
    assert [kept.index for kept in wrong_first([samples[2]], samples)] == [7, 1, 2, 5, 9], "none twice"
    assert [kept.index for kept in wrong_first([], samples[:2])] == [1, 9]


def test_headings_count() -> None:
    surest = Surest(4)
    for wrong, words in ((0, "no mistake"), (1, "only"), (4, "all 4"), (1234, "4 most confident of 1,234")):
        surest.wrong = wrong
        assert words in surest.heading()
