"""Recall at k against a slow loop."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora_pl.tasks.vision_language import recalls, unique_rows


def slow_recalls(images: Tensor, texts: Tensor, pairs: list[tuple[int, int]]) -> dict[str, float]:
    """Query by query: is a partner among the k most similar?"""
    found = {}
    for prefix, queries, candidates, own in (
        ("", images, texts, pairs),
        ("text_to_image_", texts, images, [(text, image) for image, text in pairs]),
    ):
        for k in (1, 5, 10):
            hits = 0
            for number, query in enumerate(queries):
                ranked = sorted(range(len(candidates)), key=lambda other: -float(query @ candidates[other]))
                hits += any((number, other) in own for other in ranked[:k])
            found[f"{prefix}recall@{k}"] = hits / len(queries)
    return found


@given(st.integers(1, 9), st.integers(1, 14), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_recalls_equal_a_slow_loop(images: int, texts: int, captions: int, seed: int) -> None:
    """Several captions for an image, several images for a caption, queries without a partner."""
    generator = torch.Generator().manual_seed(seed)
    image_features, text_features = (F.normalize(torch.randn(n, 4, generator=generator)) for n in (images, texts))
    pairs = [(i, int(t)) for i in range(images) for t in torch.randint(texts, (captions,), generator=generator)]
    image_ids, text_ids = torch.tensor(pairs).T
    found = recalls(image_features, text_features, image_ids, text_ids)
    assert found == pytest.approx(slow_recalls(image_features, text_features, pairs))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_unique_rows_find_each_number_and_its_first_place(numbers: list[int]) -> None:
    first, rows = unique_rows(torch.tensor(numbers))
    different = sorted(set(numbers))
    assert first.tolist() == [numbers.index(number) for number in different]
    assert [different[row] for row in rows.tolist()] == numbers
