"""LoRA-XS: the equation, the spans, counts of the paper, and the choice of the cheaper product."""

import torch
from torch import nn

from randlora_pl.adapters import LoRAXS, adapted_layers, delta_weights, inject
from randlora_pl.adapters.methods.loraxs import LoRAXSDelta
from randlora_pl.adapters.random_bases import WeightShape
from tests.adapters.cases import assert_close, randomise
from tests.support.products import in_one_item


def adapted(adapter: LoRAXS) -> tuple[nn.Sequential, LoRAXSDelta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    inject(model, adapter, ["0"])
    delta = adapted_layers(model)["0"].delta
    return model, delta


@in_one_item(("alpha", "balance"), [(None, "right"), (16.0, "right"), (16.0, "both")])
def test_equation(alpha: float | None, balance: str) -> None:
    rank = 4
    model, delta = adapted(LoRAXS(rank=rank, alpha=alpha, balance=balance))  # type: ignore[arg-type]
    u, s, v = (part.double() for part in torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False))
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    assert not delta.change(torch.empty(0)).any()
    randomise(model)
    change = delta_weights(model)["0"].double()
    signs = torch.sign((u * delta.get_buffer("U").double()).sum(0))
    inner = signs[:, None] * (u.T @ change @ v.T / s) * signs  # of the vectors with our signs
    ours = (1.0 if alpha is None else alpha / rank) * delta.R.detach().double()
    assert_close(inner, ours if balance == "right" else s.sqrt()[:, None] * ours / s.sqrt())
    assert_close(u @ u.T @ change @ v.T @ v, change)  # no other directions
    assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) == rank


def test_counts_of_the_paper_the_official_start_and_budgets() -> None:
    """Query, value, attention output and output of RoBERTa-large."""
    shapes = [*[WeightShape("query", 1024, 1024)] * 3, WeightShape("output", 1024, 4096)]
    for rank, count in {4: 1_536, 8: 6_144, 12: 13_824, 16: 24_576, 20: 38_400, 25: 60_000}.items():
        assert 24 * sum(LoRAXS(rank=rank).count(shape) for shape in shapes) == count
    _, delta = adapted(LoRAXS(rank=12, init="official", seed=3))
    again = adapted(LoRAXS(rank=12, init="official", seed=3))[1]
    assert torch.equal(delta.R, again.R) and 0.8e-5 < float(delta.R.detach().std()) < 1.2e-5
    assert inject(nn.Sequential(nn.Linear(12, 20)), LoRAXS(match="lora:1"), ["0"]).trainable == 36
