"""The check of methods of one's own: it names what is wrong with broken ones, and passes all of this program."""

import logging
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_pl import testing
from randlora_pl.adapters import Adapter, LoRA, methods
from randlora_pl.testing import CHECKS, ContractError, check_adapter
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import EXCEPT, METHODS
from tests.docs.pages import PAGES
from tests.support.products import in_one_item

PAGE = PAGES["docs/method_in_20_lines.md"]
MINE, *_ = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
"""The module of the page."""
Written = Callable[[str], Any]


@pytest.fixture
def written(own: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Return what imports a text as the user's module, and returns its method."""

    def imported(text: str) -> Any:
        own()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        Path("mine.py").write_text(text, encoding="utf-8")
        sys.path.insert(0, str(tmp_path))
        return import_module("mine").RankOne

    return imported


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on two kinds of layers, in a quarter of the time."""
    names, layers = ("a linear layer of 12 x 16", "q and v of nn.MultiheadAttention"), testing._layers
    monkeypatch.setattr(testing, "_layers", lambda width: {name: layers(width)[name] for name in names})


def findings(method: Any, **options: Any) -> dict[str, str]:
    """What is wrong with a method, by check."""
    with pytest.raises(ContractError) as caught:
        check_adapter(method, width=16, **options)
    return dict(caught.value.findings)


ZERO, ROW = "torch.zeros(rows, 1, device", "torch.full((1, columns), columns**-0.5, device=weight.device)"
CHANGE = "return self.scale * self.column @ self.row\n"
ADD = """
    def add(self, x, weight, bias):
        return nn.functional.linear(x, weight) + x @ self.change(weight).T
"""
GAIN = '        self.register_buffer("gain", torch.ones(1, device=weight.device))\n\n    def change'
GROWS = """
    def procedure(self, model):
        return Growing([each for each in model.modules() if isinstance(each, RankOneDelta)])


class Growing(Procedure):
    def __init__(self, updates):
        self.updates, self.steps = updates, 1

    def after_step(self, step, total):
        super().after_step(step, total)
        for each in self.updates:
            each.gain += 0.1 * self.steps


class RankOneDelta"""
LOST = (("Adapter, Delta", "Adapter, Procedure, Delta"), ("\n\nclass RankOneDelta", GROWS), ("\n    def change", GAIN))
LOST = (
    *LOST,
    ("return self.scale *", "return self.gain *"),
    ("adapters import Adapter", "adapters.base import Adapter"),
)
COUNTS = ("super().after_step(step, total)", "super().after_step(step, total)\n        self.steps += 1")
KEPT = ("class RankOneDelta(DeltaWeight):", 'class RankOneDelta(DeltaWeight):\n    kept = ("gain",)')
BROKEN: dict[str, tuple[tuple[tuple[str, str], ...], str, str]] = {
    "begins away from zero": (
        ((ZERO, "torch.ones(rows, 1, device"),),
        "start",
        r"on a linear layer of 12 x 16 and 1 more: the update of fc is up to 2e-01 before the training, 0 is allowed\. "
        r"Begin one factor with torch\.zeros\.",
    ),
    "another fast path": (
        ((CHANGE, CHANGE + ADD),),
        "one update",
        r"outputs of add and contribution differ by \de-0\d of the largest value, 1e-05 is allowed\. Make change",
    ),
    "a wrong count": (
        (("shape.out_features + shape.in_features", "shape.in_features"),),
        "count",
        r"count returns 16, 28 numbers train\. Count the entries of each nn\.Parameter\.",
    ),
    "writes to the frozen weight": (
        (("return self.scale", "weight.mul_(0.999)\n        return self.scale"),),
        "one update",
        r"the update changes the frozen weight\. Never write to the weight that it gets\.",
    ),
    "a buffer that training changes": (
        LOST,
        "files",
        r"other values after saving and loading: fc\.delta\.gain\. Name in `kept` the buffers that training changes",
    ),
    "a procedure without a state": (
        (*LOST, KEPT, COUNTS),
        "resume",
        r"other values after a resume: fc\.delta\.\w+.*\. Return from Procedure\.state_dict all that it remembers",
    ),
    "the global random state": (
        ((ROW, "torch.randn(1, columns, device=weight.device)"),),
        "seed",
        r"at other values in each process: fc\.delta\.row\. Draw with generator=torch\.Generator\(\)\.manual_seed",
    ),
    "options that are no JSON": (
        (("scale: float = 1.0", "scale: object = frozenset()"), ("self.scale = method.scale", "self.scale = 1")),
        "files",
        r"RankOne: options that cannot be saved \(.*frozenset.*\)\. Use numbers, texts and lists\.",
    ),
    "decay alone moves it": (
        ((ZERO, "torch.ones(rows, 1, device"), ("self.column @", "(self.column - 1) @")),
        "start",
        r"before and after weight decay without gradients differ by .*, 0e\+00 is allowed\. Name in `undecayed`",
    ),
    "trains in bfloat16": (
        ((ZERO, "torch.zeros(rows, 1, dtype=weight.dtype, device"),),
        "dtypes",
        r"fc\.delta\.column is torch\.bfloat16 in a bfloat16 model, torch\.float32 is allowed\. Make it without dtype",
    ),
    "without a gradient": (
        (("self.column @ self.row", "(self.column @ self.row.detach())"),),
        "training",
        r"without a gradient in two steps: fc\.delta\.row\. Use it in `change`",
    ),
    "on the CPU": (
        ((ZERO + "=weight.device", "torch.zeros(rows, 1"),),
        "count",
        r"not on the device of the weight: fc\.delta\.column\. Make tensors with device=weight\.device\.",
    ),
    "reads the weight": (
        (("self.column @ self.row", "self.column @ self.row * weight"),),
        "traits",
        r"change\(weight\) depends on the weight\. Set reads_weight = True in the method\.",
    ),
    "no dropout": (
        (("super().__init__(method.dropout)", "super().__init__()"),),
        "dropout",
        r"dropout 0\.5 changes no output\. Call super\(\)\.__init__\(dropout\) in the update",
    ),
    "a function that cannot be copied": (
        (("self.scale = method.scale", "self.times = lambda x: x"), ("self.scale *", "1 *")),
        "copies",
        r"it cannot be copied: .*lambda.*\. Keep no lambda and no open file in the update\.",
    ),
    "a mistake in a line": (
        (("self.column @ self.row", "self.column @ self.rows"),),
        "one update",
        r"AttributeError: .* has no attribute 'rows' \(mine\.py, line \d+\)\. Correct this line\.",
    ),
    "no definition": (
        (("    def change", "    def chang"),),
        "one update",
        r"RankOneDelta does not define change\(weight\), the matrix that is added to the weight\.",
    ),
}
"""Texts of the page's module that are exchanged, the check that finds it, and what it says."""


@in_one_item("fault", BROKEN)
def test_a_broken_method_is_named_with_layer_and_fix(fault: str, written: Written, two_layers: None) -> None:
    text, (changes, check, words) = MINE, BROKEN[fault]
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    found = findings(written(text))
    assert list(found) == [check], found
    assert found[check].startswith("on a linear layer of 12 x 16 and 1 more: ")
    assert re.search(words, found[check]), found[check]


def test_the_page_shows_the_checks_and_a_finding(written: Written) -> None:
    printed, reported = re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.S | re.M)
    named = re.findall(r"^\| `(.*?)` \|", PAGE, flags=re.M)
    assert printed.strip().split(", ") == named == [*CHECKS]
    with pytest.raises(ContractError) as caught:
        check_adapter(written(MINE.replace("torch.zeros", "torch.ones")), skip={*CHECKS} - {"start"})
    head, finding = reported.splitlines()
    assert f"  start, {caught.value.findings['start']}" == finding
    assert head == "randlora_pl.testing.ContractError: RankOne breaks 1 of 13 checks:"


def test_mended_methods_pass(written: Written, two_layers: None) -> None:
    assert check_adapter(written(MINE), width=16) == [*CHECKS]
    text = MINE
    for old, new in (*LOST, KEPT, COUNTS):
        text = text.replace(old, new)
    state = """        self.updates, self.steps = updates, 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
"""
    assert check_adapter(written(text.replace("        self.updates, self.steps = updates, 1\n", state)), width=16)


def test_the_message_has_every_finding(written: Written, two_layers: None) -> None:
    text = MINE.replace(ROW, "torch.randn(1, columns)").replace("+ shape.in_features", "")
    with pytest.raises(
        ContractError, match=r"^RankOne breaks 2 of 13 checks:\n  count, on .*\n  seed, on .*"
    ) as caught:
        check_adapter(written(text), width=16)
    assert len(str(caught.value).splitlines()) == 3
    assert [*findings(written(text), skip={*CHECKS} - {"count"})] == ["count"]


def test_a_class_of_the_main_program_is_named(two_layers: None) -> None:
    main: Any = type("Main", (LoRA,), {"__module__": "__main__"})
    found = findings(main(rank=2), skip=["copies"])  # no pickle finds it: this is not the main program
    assert list(found) == ["files"] and "Main is defined in the main program" in found["files"]
    assert "Move it to the top level of a module, and import it: from mine import Main" in found["files"]


def test_what_is_no_method_or_no_check_is_refused() -> None:
    for wrong in (LoRA.count, "LoRA", torch.nn.Linear(2, 2), int):
        with pytest.raises(UserError, match="check_adapter needs a subclass of Adapter, or an object of one, not "):
            check_adapter(wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"check_adapter has no check 'gradients'. Did you mean 'exact gradients'?"):
        check_adapter(LoRA, skip=["gradients"])
    with pytest.raises(UserError, match=r"LoRA refuses every layer of width 16, the last one with: LoRA: rank 64 is"):
        check_adapter(LoRA(rank=64), width=16)


def test_what_cannot_be_made_is_refused(written: Written, two_layers: None) -> None:
    for old, new, words in (
        ("def count", "def number", r"Can't instantiate abstract class RankOne .*count.*\. Define all methods"),
        (
            "scale: float = 1.0",
            "scale: float",
            r"missing 1 required keyword-only argument: 'scale'\. .* pass an object",
        ),
        ("return RankOneDelta(self", "RankOneDelta(self", r"RankOne\.delta_weight returns None\. Return a DeltaWeight"),
    ):
        with pytest.raises(UserError, match=words):
            check_adapter(written(MINE.replace(old, new)), width=16)


def test_a_refused_layer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        assert check_adapter(LoRA(rank=14), width=16, skip={*CHECKS} - {"count"}) == ["count"]
    refused = [line for line in caplog.messages if line.startswith("LoRA refuses a linear layer of 12 x 16, so it")]
    assert len(refused) == 1 and "rank 14 is larger than the smaller side 12" in refused[0]


def test_it_leaves_the_random_state_as_it_was(two_layers: None) -> None:
    before = torch.random.get_rng_state()
    check_adapter(LoRA(rank=2, dropout=0.1), width=16)
    assert torch.equal(torch.random.get_rng_state(), before)


def passes(row: str) -> None:
    skip = EXCEPT.get(row, ())
    assert check_adapter(METHODS[row](4, "packed"), width=16, skip=skip) == [
        name for name in CHECKS if name not in skip
    ]


def test_a_method_whose_update_is_no_matrix_passes(two_layers: None) -> None:
    passes("hydralora")


@pytest.mark.full
@pytest.mark.parametrize("row", METHODS)
def test_every_row_of_the_contract_passes_on_every_layer(row: str) -> None:
    passes(row)


@pytest.mark.full
@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_passes_with_its_own_options(name: str) -> None:
    kind: type[Adapter] = getattr(methods, name)
    assert check_adapter(kind, width=128 if name == "PRANC" else 64) == [*CHECKS]
