"""Random bases: the bits are for ever, the same for every size, and of the right distribution."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch import Tensor, nn

from randlora_pl.adapters import random_bases as bases
from randlora_pl.adapters.random_bases import Bases, Distribution, draw, fingerprint
from tests.adapters.reference import basis_word, normal_quantile
from tests.support.products import in_one_item

CPU = torch.device("cpu")
DISTRIBUTIONS = {
    "uniform": Distribution("uniform"),
    "normal": Distribution("normal"),
    "binary": Distribution("binary"),
    "ternary": Distribution.make("ternary", 6, 768),
    "ternary-sqrt": Distribution.make("ternary", "sqrt", 768),
}
# SHA-256 of the float32 bits of draw(2024, "golden", 3, 64, 50). A change of a bit orphans every adapter
# that exists: then change GENERATOR too, and read old files with the old generator.
GOLDEN = {
    "uniform": "83cc5f22cbae8ba0a50bd7f452ce53400a383a92aa172a4c83a63bcd3917de39",
    "normal": "f5597e7e94af7fa681cf961f04f1c3dda90ce7e97286b1f132a7cde1a4ec5e48",
    "binary": "8baa82ffe660057b5f74c1db9e34d56b7b8c9384f99095f8451f48c957629f6f",
    "ternary": "f82a3439bb05f96af0e41e49aae8b668a6674f4a58a07d49f638aabc46787aaa",
    "ternary-sqrt": "ff47cdaf7ef79ba816bd6f5dbd0810501d29cbc060d01d3a253ec613756737de",
}

each_distribution = in_one_item("name", DISTRIBUTIONS)


def drawn(name: str, count: int, rows: int, columns: int, seed: int = 0, tensor: str = "B") -> Tensor:
    return draw(seed, tensor, count, rows, columns, DISTRIBUTIONS[name], CPU)


def many(name: str) -> Tensor:
    """Half a million entries."""
    return drawn(name, 8, 250, 250).flatten().double()


@each_distribution
def test_golden_hashes(name: str) -> None:
    entries = drawn(name, 3, 64, 50, seed=2024, tensor="golden")
    assert hashlib.sha256(entries.numpy().astype("<f4").tobytes()).hexdigest() == GOLDEN[name]


def test_normal_bits_equal_those_of_plain_python() -> None:
    words = torch.tensor([[[basis_word(5, "B", j, i, k) for k in range(20)] for i in range(20)] for j in range(2)])
    words.view(-1)[:4] = torch.tensor([0, 1, 2**32 - 1, 2**31])
    exact = torch.tensor([normal_quantile(word) for word in words.flatten().tolist()], dtype=torch.float64)
    assert torch.equal(bases._normal_quantile(words).flatten(), exact)
    assert torch.equal(drawn("normal", 2, 20, 20, seed=5).flatten()[4:], exact.float()[4:])


def test_the_fingerprint_is_for_ever_and_tells_seed_bits_and_shape() -> None:
    assert bases.GENERATOR == "philox4x32-10/1"
    shared = Bases(1, drawn("uniform", 1, 6, 16, seed=1, tensor="A"), drawn("uniform", 3, 24, 6, seed=1))
    assert shared.fingerprint == "e1239e86644043b8377acb36d590f9a550a4382f2f26b588c3ba32eaabb8be69"
    a, b = drawn("uniform", 1, 2, 8), drawn("uniform", 2, 8, 2)
    known = fingerprint(0, a, b)
    bent = b.clone()
    bent[1, 2, 1] = torch.nextafter(bent[1, 2, 1], torch.tensor(9.0))
    assert known == fingerprint(0, a.clone(), b.clone())
    assert len({known, fingerprint(1, a, b), fingerprint(0, a, bent), fingerprint(0, a.view(1, 4, 4), b)}) == 4


@given(st.integers(0, 2**64 - 1), st.integers(0, 500), st.integers(0, 3), st.integers(0, 40))
def test_an_entry_is_a_function_of_seed_tensor_and_position(seed: int, j: int, row: int, column: int) -> None:
    word = basis_word(seed, "B", j, row, column)
    entry = draw(seed, "B", j + 1, row + 1, column + 1, DISTRIBUTIONS["binary"], CPU)[j, row, column].item()
    assert entry == (1.0 if word >= 2**31 else -1.0)
    entry = draw(seed, "B", j + 1, row + 1, column + 1, DISTRIBUTIONS["uniform"], CPU)[j, row, column].item()
    assert entry == pytest.approx(((word >> 8) + 0.5 - 2**23) / 2**23 * math.sqrt(3), rel=1e-6)


@given(st.sampled_from(sorted(DISTRIBUTIONS)), st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(0, 9)] * 3))
def test_entries_do_not_depend_on_the_allocated_size(
    name: str, small: tuple[int, int, int], more: tuple[int, int, int]
) -> None:
    count, rows, columns = small
    large = drawn(name, *(a + b for a, b in zip(small, more, strict=True)))
    assert torch.equal(large[:count, :rows, :columns], drawn(name, *small))


def test_entries_do_not_depend_on_chunks_threads_or_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn("normal", 7, 10, 30)
    monkeypatch.setattr(bases, "_CHUNK", 200)
    assert torch.equal(drawn("normal", 7, 10, 30), expected)
    torch.set_num_threads(2)
    assert torch.equal(drawn("normal", 7, 10, 30), expected)
    torch.set_num_threads(1)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(drawn("normal", 7, 10, 30), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(drawn("normal", 7, 10, 30), expected)


def test_seeds_and_tensors_differ() -> None:
    first = drawn("uniform", 2, 20, 20)
    for other in (drawn("uniform", 2, 20, 20, seed=1), drawn("uniform", 2, 20, 20, tensor="A")):
        assert (first == other).sum() == 0
    assert (first[0] == first[1]).sum() == 0
    assert len(first.unique()) > 0.99 * first.numel()


@each_distribution
def test_unit_variance_and_zero_mean(name: str) -> None:
    entries = many(name)
    size = entries.numel()
    fourth = entries.pow(4).mean().item()
    assert entries.mean().abs() < 5 / math.sqrt(size)
    assert abs(entries.square().mean().item() - 1) < 5 * math.sqrt(max(fourth - 1, 0) / size) + 1e-6


def test_the_normal_quantile_is_accurate_everywhere() -> None:
    edges = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    tails = torch.logspace(0, 31, 200, base=2.0, dtype=torch.float64).long()
    word = torch.cat([edges, tails, 2**32 - tails, torch.arange(0, 2**32, 2**32 // 1000)])
    word = word.clamp(max=2**32 - 1)
    exact = torch.from_numpy(special.ndtri(((word.double() + 0.5) / 2**32).numpy()))
    assert torch.allclose(bases._normal_quantile(word), exact, rtol=1e-13, atol=1e-15)
    assert torch.isfinite(exact).all()


@in_one_item("sparsity", [2, 3, 6, 28, 100, 200, "sqrt"])
def test_ternary_has_the_share_of_zeros_and_the_size_of_the_rest(sparsity: int) -> None:
    s = math.sqrt(768) if sparsity == "sqrt" else sparsity
    entries = draw(0, "B", 8, 250, 250, Distribution.make("ternary", sparsity, 768), CPU).flatten()
    zeros = 1 - 2 / s
    spread = 5 * math.sqrt(zeros * (1 - zeros) / entries.numel())
    assert abs((entries == 0).double().mean().item() - zeros) <= spread
    assert abs((entries > 0).double().mean().item() - 1 / s) <= 5 * math.sqrt(1 / s / entries.numel())
    assert entries[entries != 0].abs().unique().tolist() == [pytest.approx(math.sqrt(s / 2), rel=1e-6)]


def test_the_meta_device_allocates_nothing() -> None:
    entries = draw(0, "B", 1000, 100_000, 1000, DISTRIBUTIONS["uniform"], torch.device("meta"))
    assert entries.is_meta
    assert Bases(0, entries, entries).fingerprint == ""


def test_bases_keep_their_bits_when_the_model_changes_dtype() -> None:
    a, b = drawn("uniform", 1, 2, 8), drawn("uniform", 2, 8, 2)
    model = nn.ModuleDict({"bases": Bases(0, a, b), "fc": nn.Linear(3, 3)})
    for change in (model.bfloat16, model.half, model.float, model.double):
        change()
        shared = model["bases"]
        assert isinstance(shared, Bases)
        assert torch.equal(shared.A, a)
        assert torch.equal(shared.B, b.permute(1, 0, 2))
        assert {buffer.dtype for buffer in shared.buffers()} == {torch.float32}
    assert model.state_dict().keys() == {"fc.weight", "fc.bias"}
    assert shared.fingerprint[:12] in repr(shared)


def test_the_square_root_is_exact_to_the_last_bits() -> None:
    # PyTorch's own is not IEEE-exact everywhere: with MKL it differs from the processor's in 1 % of float64 numbers.
    x = torch.linspace(0.5, 30, 10_001, dtype=torch.float64)
    exact = torch.tensor([math.sqrt(value) for value in x.tolist()], dtype=torch.float64)
    assert ((bases._square_root(x) - exact).abs() <= exact * 2**-52).all()
