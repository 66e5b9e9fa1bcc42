"""CKA against a direct formula, its invariances, and the layers that are watched."""

from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import RandLoRA, inject, merge
from randlora_pl.lab.analysis.models import MinibatchCKA, compare, gram, hsic1, outputs, vision_layers
from randlora_pl.models import ImageTower, load_clip, load_vit
from randlora_pl.utils.errors import UserError
from tests.tasks.small import images, two_blocks


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_hsic(k: Tensor, m: Tensor) -> float:
    """The U-statistic that HSIC_1 is (Song et al., 2012, theorem 2), over all quadruples of different images."""
    quadruples = list(permutations(range(len(k)), 4))
    return sum(float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])) for i, j, q, r in quadruples) / len(quadruples)


def cka(x: Tensor, y: Tensor, size: int = 1000) -> float:
    sums = MinibatchCKA()
    for a, b in zip(x.split(size), y.split(size), strict=True):
        sums.update(gram(a), gram(b))
    return sums.value


@pytest.mark.parametrize("n", [4, 5, 7])
def test_hsic_is_the_mean_over_quadruples(n: int) -> None:
    k, m = gram(noise(0, n, 3)), gram(noise(1, n, 5) + 2)
    assert float(hsic1(k, m)) == pytest.approx(slow_hsic(k, m), rel=1e-10)


def test_minibatches_are_put_together_as_the_formula_says() -> None:
    x, y = noise(0, 15, 4), noise(1, 15, 6)
    y[:, :4] += x
    parts = [(gram(a), gram(b)) for a, b in zip(x.split(5), y.split(5), strict=True)]
    cross, one, other = (sum(slow_hsic(*pair) for pair in pairs) for pairs in (
        parts, [(k, k) for k, _ in parts], [(m, m) for _, m in parts],
    ))  # fmt: skip
    assert cka(x, y, 5) == pytest.approx(cross / (one * other) ** 0.5, rel=1e-10)


def test_large_batches_agree_with_the_common_formula() -> None:
    x = noise(0, 3000, 4)
    y = x @ noise(1, 4, 6) + noise(2, 3000, 6)
    a, b = x - x.mean(0), y - y.mean(0)
    biased = float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))  # Kornblith et al., section 3
    assert cka(x, y) == pytest.approx(biased, abs=0.01)
    assert cka(x, noise(3, 3000, 6)) == pytest.approx(0, abs=0.01)


def test_constant_activations_have_no_cka() -> None:
    assert cka(torch.ones(8, 3), noise(0, 8, 3)) != cka(torch.ones(8, 3), noise(0, 8, 3))  # NaN


def towers() -> dict[str, nn.Module]:
    with two_blocks():
        clip = load_clip("tiny", "random").model
    return {"clip": clip, "tower": ImageTower(clip), "vit": load_vit("test_vit", "random", img_size=32).model}


@pytest.mark.parametrize("name", ["clip", "tower", "vit"])
def test_each_layer_is_seen_once_for_each_image(name: str) -> None:
    model = towers()[name].eval()
    layers = vision_layers(model)
    blocks = {number for number, _ in layers}
    assert blocks == set(range(len(layers) // 2)) and {kind for _, kind in layers} == {"attention", "mlp"}
    with outputs(layers) as seen, torch.no_grad():
        (model.encode_image if name == "clip" else model)(images(5))  # type: ignore[operator]
        assert seen.keys() == layers.keys()
        assert {len(tensor) for tensor in seen.values()} == {5} and {t.dim() for t in seen.values()} == {3}
    assert not any(layer._forward_hooks for layer in layers.values())


def test_attention_with_the_batch_second_is_turned() -> None:
    layer = nn.MultiheadAttention(8, 2)
    with outputs({(0, "attention"): layer}) as seen:
        x = torch.randn(3, 7, 8)
        layer(x, x, x)
    assert seen[0, "attention"].shape == (7, 3, 8)


def test_a_model_is_like_itself_and_less_like_a_changed_one() -> None:
    model, changed = (towers()["tower"].eval() for _ in range(2))
    inject(changed, RandLoRA(rank=8))
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batches = [images(6), images(6).flip(0), images(2)]  # the last is too small to count
    found = compare(model, {"itself": model, "changed": changed}, batches)
    assert all(abs(value - 1) < 1e-6 for value in found["itself"].values())
    assert all(value < 0.999 for value in found["changed"].values())
    merge(changed)
    merged = compare(model, {"changed": changed}, batches)["changed"]
    assert all(merged[place] == pytest.approx(value, abs=1e-4) for place, value in found["changed"].items())


def test_refusals() -> None:
    model = towers()["tower"].eval()
    with pytest.raises(UserError, match="images"):
        compare(model, {"x": model}, [images(3)])
    with pytest.raises(UserError, match="attention"):
        vision_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match="reference"):
        compare(model, {"x": towers()["vit"]}, [images(4)])
