"""Pieces of the losses that the tests of whole windows do not reach."""

import torch
import torch.nn.functional as F

from randlora_pl.tasks.losses import WindowFeatures, caption_losses, normalize, similarities


def test_similarities_stay_in_float32_under_autocast() -> None:
    images, texts = torch.randn(5, 64), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = images @ texts.T
        found = similarities(normalize(images.bfloat16()), normalize(texts.bfloat16()))
    assert rounded.dtype == torch.bfloat16  # what autocast would have done
    exact = F.normalize(images.bfloat16().double(), dim=1) @ F.normalize(texts.bfloat16().double(), dim=1).T
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


def test_similarities_pass_gradients_in_the_dtype_of_the_features() -> None:
    images = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    similarities(normalize(images), torch.eye(4)).sum().backward()
    assert images.grad is not None and images.grad.dtype == torch.bfloat16


def test_caption_loss_of_one_caption_is_the_log_of_its_count() -> None:
    losses = caption_losses(torch.randn(3, 1), torch.tensor([7, 7, 7]), torch.tensor([7]), torch.tensor([3]))
    torch.testing.assert_close(losses, torch.tensor(3.0).log().expand(3))


def test_window_of_frozen_texts_carries_nothing() -> None:
    window = WindowFeatures(torch.randn(2, 3))
    weight = torch.randn(3, requires_grad=True)
    (window.use(False) @ weight).sum().backward()
    assert window.leaf.grad is None
    assert window.pending(1.0).item() == 0
    assert not window.pending(1.0).requires_grad
