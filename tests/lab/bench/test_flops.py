import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora_pl.adapters import RandLoRA, inject
from randlora_pl.lab.bench import Gemm, counter


def test_a_linear_layer_costs_three_products() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(5, 8, requires_grad=True)
    with counter() as operations:
        layer(x).sum().backward()
    assert operations.get_total_flops() == 3 * (2 * 5 * 8 * 16)


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (16, 8)])
def test_the_products_of_a_custom_function_are_counted(rows: int, columns: int) -> None:
    model, x = nn.Sequential(nn.Linear(rows, columns)), torch.randn(400, rows, requires_grad=True)
    inject(model, RandLoRA(rank=2, memory="fast"), ["all"])
    with counter() as operations:
        model(x).sum().backward()
    layer = 3 * (2 * 400 * 8 * 16)  # the layer itself, both gradients
    build = 2 * (2 * 16 * 8 * 8)  # B (16, n r = 8) times the stack (8, 8), and B^T times the gradient
    reduce = 2 * (2 * 4 * 2 * 8)  # to lambda and gamma, over (n, r, d)
    assert operations.get_total_flops() == layer + build + reduce


def test_fused_attention_on_a_cpu_is_counted() -> None:
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    with counter() as operations:
        result = F.scaled_dot_product_attention(q, k, v)
    product = 2 * (2 * 3) * 7 * 7 * 4
    assert operations.get_total_flops() == 2 * product
    with counter() as operations:
        result.sum().backward()
    assert operations.get_total_flops() == 5 * product  # the scores are computed again


def test_a_large_product_has_a_rate() -> None:
    gemm = Gemm(torch.device("cpu"), torch.float32, side=64)
    assert gemm.rate() > 2 * 64**3
    assert not any(isinstance(value, torch.Tensor) for value in vars(gemm).values())  # it takes no memory of the cases
