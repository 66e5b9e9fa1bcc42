"""The counter-based generator: published answers, a plain Python twin, and independence of everything else."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.utils.rng import integers, permutation, philox, stream, words
from tests.adapters import reference

WORD = st.integers(0, 2**32 - 1)
# Counter, key and result of philox4x32-10 in the known-answer file of Random123 (Salmon et al., SC 2011).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def run(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    first, second, third, fourth = (torch.tensor(value) for value in counter)
    return tuple(int(word) for word in philox(key[0] | key[1] << 32, (first, second, third, fourth)))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert run(counter, key) == answer


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_equals_a_plain_python_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    assert run(counter, key) == reference.philox(key, counter)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**64 - 1), WORD)
def test_a_word_is_a_function_of_seed_name_index_and_part(index: int, seed: int, part: int) -> None:
    counter = (index & 0xFFFFFFFF, index >> 32, part, stream("order"))
    expected = reference.philox((seed & 0xFFFFFFFF, seed >> 32), counter)[0]
    assert words(seed, "order", torch.tensor(index), part).item() == expected


def test_words_do_not_depend_on_the_shape_or_the_neighbours() -> None:
    index = torch.arange(600)
    expected = words(3, "x", index)
    assert torch.equal(words(3, "x", index.view(20, 30)).flatten(), expected)
    assert torch.equal(words(3, "x", index.flip(0)).flip(0), expected)
    assert torch.equal(words(3, "x", index[100:101]), expected[100:101])


def test_the_bits_never_change() -> None:
    values = words(1234, "golden", torch.arange(1000), 5)
    digest = hashlib.sha256(values.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == "9b0ae8c658893a6a8e78fe7405a8d29c4362d70170dd0006553884d8b8e45936"
    assert permutation(7, "golden", 10).tolist() == [3, 5, 2, 4, 7, 0, 8, 9, 1, 6]
    assert stream("golden") == 1105090269


def test_streams_differ() -> None:
    index = torch.arange(1000)
    draws = [words(s, n, index, p) for s, n, p in ((0, "a", 0), (1, "a", 0), (2**32, "a", 0), (0, "b", 0), (0, "a", 1))]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert (first == second).sum() == 0


def test_negative_and_huge_seeds_are_taken_modulo_two_to_the_64th() -> None:
    index = torch.arange(10)
    assert torch.equal(words(-1, "a", index), words(2**64 - 1, "a", index))
    assert torch.equal(words(2**64 + 5, "a", index), words(5, "a", index))


def test_words_are_uniform() -> None:
    counts = torch.bincount(words(0, "uniform", torch.arange(2**16)) >> 24, minlength=256).double()
    chi_squared = ((counts - 256) ** 2 / 256).sum().item()
    assert 255 - 5 * 22.6 < chi_squared < 255 + 5 * 22.6  # standard deviation: sqrt(2 * 255)


@given(st.integers(1, 2**31), st.integers(0, 1000))
def test_integers_stay_below_high(high: int, seed: int) -> None:
    values = integers(seed, "n", torch.arange(200), high)
    assert values.min() >= 0
    assert values.max() < high


def test_integers_reach_every_value_equally() -> None:
    counts = torch.bincount(integers(0, "n", torch.arange(14_000), 7), minlength=7)
    assert counts.shape == (7,)
    assert (counts - 2_000).abs().max() < 5 * 42


@given(st.integers(0, 300), st.integers(0, 2**40))
def test_permutations_hold_every_number_once(size: int, seed: int) -> None:
    assert sorted(permutation(seed, "p", size).tolist()) == list(range(size))


def test_permutations_move_every_number_everywhere() -> None:
    positions = torch.stack([permutation(seed, "p", 5) for seed in range(500)])
    for place in positions.T:
        assert (torch.bincount(place, minlength=5) - 100).abs().max() < 45  # five standard deviations
    assert not torch.equal(permutation(0, "p", 50), permutation(0, "p", 50, part=1))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    permutation(0, "p", 100)
    integers(0, "n", torch.arange(100), 5)
    assert torch.equal(torch.get_rng_state(), before)
