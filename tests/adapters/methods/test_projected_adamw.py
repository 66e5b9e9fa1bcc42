"""The optimizer of GaLore and Fira against their equations, its state, and defects of released code that it lacks."""

import io
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from randlora_pl.adapters import Fira, GaLore, ProjectedAdamW, inject, make_optimizer
from randlora_pl.adapters.methods.full import GROWTH, leading_vectors, projected_weights
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close
from tests.support.products import in_one_item

Array = NDArray[np.float64]
SHAPES = {"wide": (6, 9), "tall": (9, 6), "square": (7, 7), "convolution": (6, 2, 2, 2)}


def by_the_equations(start: Array, gradients: list[Array], fira: bool, **o: Any) -> tuple[Array, list[float]]:
    """Weights after some steps, entry by entry, with P from the SVD; and how much the limiter cut each time."""
    weight, turned = start.reshape(len(start), -1).copy(), start.reshape(len(start), -1).shape
    first = second = basis = last = None
    cuts: list[float] = []
    for step, gradient in enumerate(gradients):
        g = gradient.reshape(turned)
        g = g.T if turned[0] > turned[1] else g
        if step % o["period"] == 0:
            basis = np.linalg.svd(g)[0][:, : o["rank"]]
            basis = basis * np.sign(basis[np.abs(basis).argmax(0), range(basis.shape[1])])
        assert basis is not None
        low = basis.T @ g
        first = 0.1 * low if first is None else 0.9 * first + 0.1 * low
        second = 0.001 * low**2 if second is None else 0.999 * second + 0.001 * low**2
        adam = np.zeros_like(low)
        for i, j in np.ndindex(low.shape):
            mean, square = first[i, j] / (1 - 0.9 ** (step + 1)), second[i, j] / (1 - 0.999 ** (step + 1))
            adam[i, j] = mean / (math.sqrt(square) + 1e-8)
        change = basis @ adam
        if fira:
            rest = g - basis @ low
            for j in range(rest.shape[1]):
                rest[:, j] *= np.linalg.norm(adam[:, j]) / np.linalg.norm(low[:, j])
            norm = np.linalg.norm(rest)
            limit = math.inf if last is None else GROWTH * last
            cuts.append(min(1.0, limit / norm))
            change, last = change + rest * cuts[-1], norm * cuts[-1]
        weight -= o["lr"] * o["weight_decay"] * weight
        weight -= o["lr"] * o["scale"] * (change.T if turned[0] > turned[1] else change)
    return weight.reshape(start.shape), cuts


def random_gradients(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    for step in range(count):
        yield (torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + step % 3)).to(dtype)


def stepped(weight: nn.Parameter, gradients: Any, optimizer: ProjectedAdamW) -> Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@in_one_item(("shape", "fira"), [(shape, fira) for shape in SHAPES for fira in (False, True)])
def test_updates_are_those_of_the_equations(shape: str, fira: bool) -> None:
    options: dict[str, Any] = {"rank": 3, "scale": 0.25, "period": 4, "lr": 0.05, "weight_decay": 0.1}
    weight = nn.Parameter(torch.randn(SHAPES[shape], dtype=torch.float64))
    start, gradients = weight.detach().numpy().copy(), list(random_gradients(SHAPES[shape], 10))
    expected, cuts = by_the_equations(start, [gradient.numpy() for gradient in gradients], fira, **options)
    actual = stepped(weight, gradients, ProjectedAdamW([weight], [weight], full_rank=fira, **options))
    assert_close(actual, torch.tensor(expected), 1e-9)
    assert not fira or {cut < 1 for cut in cuts} == {True, False}  # the limiter acts in some steps


class Language(nn.Module):
    """A block with embeddings, a tied head, an untied one and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(20, 12), nn.LayerNorm(12)
        self.block = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
        self.tied, self.free, self.new = nn.Linear(12, 20, bias=False), nn.Linear(12, 20), nn.Linear(12, 5)
        self.tied.weight = self.tokens.weight
        self.places = nn.Parameter(torch.randn(4, 12))

    def get_output_embeddings(self) -> nn.Module:
        return self.free

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.block(self.tokens(x) + self.places))
        out: Tensor = self.tied(hidden).sum() + self.free(hidden).square().sum() + self.new(hidden).square().sum()
        return out


@in_one_item("kind", [GaLore, Fira])
def test_state_is_small_and_everything_else_is_adamw(kind: Any) -> None:
    model, adapter = Language(), kind(rank=4, period=2)
    twin = deepcopy(model)
    report = inject(model, adapter, trained=["new"])
    assert report.trainable == report.total and "moments of 4 weights are projected to rank 4" in str(report)
    expected = {"in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight"}
    assert {name.removeprefix("block.").removeprefix("self_attn.") for name in projected_weights(model)} == expected
    own, plain = make_optimizer(model, lr=0.01, weight_decay=0.1), torch.optim.AdamW(twin.parameters(), 0.01)
    plain.param_groups[0]["weight_decay"] = 0.1
    texts = torch.randint(20, (3, 4))
    twins = dict(twin.named_parameters())
    for _ in range(3):
        model(texts).backward()
        for name, parameter in model.named_parameters():  # of the same weights
            twins[name].grad = parameter.grad.clone() if parameter.grad is not None else None
        own.step()
        plain.step()
        own.zero_grad()
    for name, parameter in model.named_parameters():
        if name in projected_weights(model):
            assert not torch.allclose(parameter, twins[name])
        else:
            assert_close(parameter.detach(), twins[name].detach(), 1e-5)
    stored = [value for state in own.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in stored) == report.adapter.optimizer_numbers(model) < 2 * report.trainable
    moments = [own.state[weight]["exp_avg"].shape for weight in projected_weights(model).values()]
    assert moments == [(4, 36), (4, 12), (4, 24), (4, 24)]


@in_one_item(("fira", "dtype"), [(fira, dtype) for fira in (False, True) for dtype in (torch.float32, torch.bfloat16)])
def test_resumes_with_the_same_bits_after_every_step(fira: bool, dtype: torch.dtype) -> None:
    """State as files have it, read by PyTorch's safe loader; P changes at steps 3 and 6."""
    options: dict[str, Any] = {"rank": 2, "period": 3, "full_rank": fira, "lr": 0.01, "weight_decay": 0.1}

    def make() -> tuple[nn.ParameterList, ProjectedAdamW]:
        torch.manual_seed(0)
        weights = nn.ParameterList([torch.randn(6, 5, dtype=dtype), torch.randn(6, dtype=dtype)])
        return weights, ProjectedAdamW(weights.parameters(), [weights[0]], **options)

    def run(weights: nn.ParameterList, optimizer: ProjectedAdamW, first: int, last: int) -> None:
        for matrix in list(random_gradients((6, 5), 8, dtype))[first:last]:
            weights[0].grad, weights[1].grad = matrix.clone(), matrix[:, 0].clone()
            optimizer.step()

    whole, optimizer = make()
    run(whole, optimizer, 0, 8)
    for killed in range(1, 8):
        weights, before = make()
        run(weights, before, 0, killed)
        torch.save([weights.state_dict(), before.state_dict()], file := io.BytesIO())
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again, after = make()
        again.load_state_dict(saved[0])
        after.load_state_dict(saved[1])
        run(again, after, killed, 8)
        assert all(torch.equal(one, two) for one, two in zip(again, whole, strict=True)), killed
        assert deepcopy(after).param_groups[0]["projected"] == [0]


def test_moments_of_bfloat16_weights_decay() -> None:
    """In bfloat16 0.999 v is v."""
    v = torch.ones((), dtype=torch.bfloat16)
    assert v.mul(0.999) == v
    weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    optimizer = ProjectedAdamW([weight], [weight], rank=2)
    stepped(weight, [torch.randn(4, 6).bfloat16(), *torch.zeros(3, 4, 6, dtype=torch.bfloat16)], optimizer)
    state = optimizer.state[weight]
    seconds = [state["exp_avg_sq"].clone()]
    stepped(weight, torch.zeros(100, 4, 6, dtype=torch.bfloat16), optimizer)
    assert state["exp_avg_sq"].dtype == state["projection"].dtype == torch.float32
    assert_close(state["exp_avg_sq"], seconds[0] * 0.999**100, 1e-4)


def test_a_zero_gradient_sets_no_projection_and_signs_are_canonical() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = ProjectedAdamW([weight], [weight], rank=2, period=50)
    before, gradient = weight.detach().clone(), torch.randn(4, 6)
    stepped(weight, [torch.zeros(4, 6)], optimizer)
    assert torch.equal(weight, before) and "projection" not in optimizer.state[weight]
    stepped(weight, [gradient], optimizer)
    basis = optimizer.state[weight]["projection"]
    assert torch.equal(basis, leading_vectors(gradient, 2)) and torch.equal(basis, leading_vectors(-gradient, 2))
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    with pytest.raises(UserError, match=r"4 x 6.* is not finite .* step 1"):
        stepped(weight, [gradient * math.nan], ProjectedAdamW([weight], [weight], rank=2))


def test_fira_is_not_limited_by_rounding_and_does_not_depend_on_scales() -> None:
    """A first gradient of rank 1, after which the second term is as large as without it."""
    shape, generator = (6, 8), torch.Generator().manual_seed(1)
    thin = torch.outer(torch.randn(6, generator=generator), torch.randn(8, generator=generator))
    later = [torch.randn(shape, generator=generator) for _ in range(2)]
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = ProjectedAdamW([weight], [weight], rank=2, full_rank=True)
    stepped(weight, [thin], optimizer)
    assert optimizer.state[weight]["outside_norm"] == 0
    stepped(weight, later[:1], optimizer)
    assert optimizer.state[weight]["outside_norm"] > 1
    ends = []
    for factor, scale in ((1.0, 1.0), (1e-12, 1.0), (1.0, 0.25)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = ProjectedAdamW([weight], [weight], rank=2, scale=scale, full_rank=True, lr=0.1, eps=0)
        ends.append(stepped(weight, [gradient * factor for gradient in later], optimizer))
    assert_close(ends[1], ends[0], 1e-4)
    assert_close(ends[2], ends[0] * 0.25, 1e-5)  # of the whole update


def test_a_report_says_how_many_ranks_are_cut() -> None:
    note = inject(nn.Sequential(nn.Linear(8, 300), nn.Linear(300, 300)), GaLore()).notes
    assert note == ["moments of 2 weights are projected to rank 128, cut to the smaller side in 1 of them"]
