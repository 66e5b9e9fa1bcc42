"""Recall at k for images with captions, in both directions."""

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def recalls(images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor) -> dict[str, float]:
    """Compute the fraction of queries with a partner among the k nearest candidates.

    An image may have several captions and a caption several images; one partner among the first k is a hit.

    Args:
        images: (m, e) features of unit length, one row for each different image.
        texts: (n, e) features of unit length, one row for each different caption.
        image_ids: (p,) row of the image of each pair.
        text_ids: (p,) row of the caption of each pair.

    Returns:
        ``recall@k`` (image to text) and ``text_to_image_recall@k`` for k = 1, 5 and 10.
    """
    partners = torch.zeros(len(images), len(texts), dtype=torch.bool, device=images.device)
    partners[image_ids, text_ids] = True
    similarity = images @ texts.T
    found = {}
    for prefix, scores, hits in (("", similarity, partners), ("text_to_image_", similarity.T, partners.T)):
        order = scores.topk(min(max(RECALL_AT), scores.shape[1]), dim=1).indices
        right = hits.gather(1, order).cumsum(dim=1) > 0
        for k in RECALL_AT:
            found[f"{prefix}recall@{k}"] = right[:, min(k, right.shape[1]) - 1].float().mean().item()
    return found


def unique_rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first position of each different number, in sorted order, and the row of each number among them."""
    unique, rows = torch.unique(numbers, return_inverse=True)
    indices = torch.arange(len(numbers), device=numbers.device)
    first = torch.full_like(unique, len(numbers)).scatter_reduce(0, rows, indices, "amin")
    return first, rows
