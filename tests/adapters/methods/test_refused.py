"""Options and sizes that the methods refuse, each with what to set instead."""

import math
from typing import Any

import pytest

from randlora_pl.adapters import (
    OFT,
    PRANC,
    SVFT,
    AdaLoRA,
    Adapter,
    AutoLoRA,
    BitFit,
    DoRA,
    Fira,
    FullFineTuning,
    GaLore,
    HiRA,
    HydraLoRA,
    LoRA,
    LoRAXS,
    NoLA,
    PiSSA,
    RandLoRA,
    SHiRA,
    Together,
    inject,
)
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One
from tests.support.products import in_one_item

OPTIONS: list[tuple[type[Adapter], dict[str, Any], str]] = [
    (RandLoRA, {"basis": "gaussian"}, "basis is 'gaussian'. Set uniform, normal, binary, ternary or hadamard"),
    (RandLoRA, {"init": "zero"}, "init is 'zero'. Set gamma or lambda"),
    (RandLoRA, {"pairing": "official"}, "pairing is 'official'. Set equation or peft"),
    (RandLoRA, {"variant": "c"}, "variant is 'c'. Set full, a or b"),
    (RandLoRA, {"num_bases": 0}, "num_bases is 0. Set a positive whole number"),
    (RandLoRA, {"num_bases": "floor"}, "num_bases is 'floor'"),
    (RandLoRA, {"num_bases": {".*": 0}}, "num_bases"),
    (RandLoRA, {"memory": "high"}, "memory is 'high'. Set auto, low or fast"),
    (RandLoRA, {"matched_rank": 0}, "matched_rank is 0"),
    (RandLoRA, {"qkv": "joint"}, "qkv is 'joint'. Set packed or split"),
    *((RandLoRA, {"basis": "ternary", "sparsity": s}, "sparsity is") for s in (1, 0, 2.5, "root", 2_000_000, None)),
    (LoRA, {"init": "zero"}, "init is 'zero'. Set kaiming or official"),
    (NoLA, {"num_bases": 0}, "num_bases"),
    (NoLA, {"init": "ones"}, "'ones'"),
    (LoRAXS, {"balance": "left"}, "balance is 'left'. Set right or both"),
    (LoRAXS, {"init": "zeros"}, r"init is 'zeros'. Did you mean 'zero'\? Set zero or official"),
    (PiSSA, {"start": "svd"}, "start is 'svd'. Set pissa, olora or minor"),
    (PRANC, {"coefficients": 0}, "coefficients is 0"),
    (PRANC, {"form": "thin"}, "'thin'. Set shared or dense"),
    (SHiRA, {"places": "best"}, "'best'. Set random or top"),
    (SVFT, {"pattern": "thin"}, "'thin'. Set plain, banded"),
    (SVFT, {"off_diagonals": -1}, "off_diagonals is -1"),
    (OFT, {"neumann_terms": 3}, "neumann_terms is 3. Set a whole number of at least 4"),
    (OFT, {"neumann_terms": "x"}, "neumann_terms is 'x'. Set a whole number of at least 4"),
    *((HydraLoRA, {"heads": heads}, "heads is .* Set a positive whole number") for heads in (0, 1.5, True)),
    (HydraLoRA, {"balance": -1}, "balance is -1"),
    (AutoLoRA, {"order": "second"}, "AutoLoRA: order is "),
    (AutoLoRA, {"every": 0}, "AutoLoRA: every is "),
    (AutoLoRA, {"every": True}, "AutoLoRA: every is "),
    (AutoLoRA, {"select": "rows"}, "AutoLoRA: select is "),
    *((Fira, {"rank": rank}, "Fira: rank is .*Set a positive whole number") for rank in (0, True)),
    (Fira, {"period": 1.5}, "Fira: period is .*Set a positive whole number"),
    *((Fira, {"scale": scale}, "Fira: scale is .*Set a positive number") for scale in (0, math.inf)),
    (AdaLoRA, {"target_rank": 0}, "target_rank is 0"),
    (AdaLoRA, {"warmup": 0.6, "final": 0.4}, "warmup is 0.6 and final is 0.4. Set fractions of the run"),
    (AdaLoRA, {"warmup": -0.1}, "warmup is -0.1. Set 0 or a positive number"),
    (AdaLoRA, {"every": 0}, "every is 0. Set a positive whole number"),
    (AdaLoRA, {"beta2": 1.0}, "AdaLoRA: beta2 is 1.0. Set a number from 0 to below 1"),
    (AdaLoRA, {"gamma": math.nan}, "gamma is nan. Set 0 or a positive number"),
    (AdaLoRA, {"orthogonality": "peft"}, "orthogonality is 'peft'. Set code or paper"),
    *(
        (DoRA, {"inner": inner}, f"^DoRA: inner is {inner.method()}. Choose")
        for inner in (BitFit(), DoRA(), HydraLoRA(), AutoLoRA())  # AutoLoRA's search needs data that know of it
    ),
    (DoRA, {"inner": Together([LoRA(dropout=0.1), RandLoRA()])}, "parts of its inner Together have dropout"),
    (Together, {"parts": []}, "parts has 0. Give two methods or more"),
    (Together, {"parts": [LoRA()]}, "parts has 1. Give two methods or more"),
    (Together, {"parts": [LoRA(), FullFineTuning()]}, "FullFineTuning cannot be a part. Give methods that add"),
    (Together, {"parts": [LoRA(), Together()]}, "Together cannot be a part"),
    (Together, {"parts": [LoRA(), AutoLoRA()]}, "AutoLoRA cannot be a part"),
    (Together, {"parts": [LoRA(), "RandLoRA"]}, r"parts\[1\] is 'RandLoRA'. Set an object of Adapter"),
    (Together, {"parts": [LoRA(qkv="split"), RandLoRA()]}, "some parts have qkv packed and some split"),
    (Together, {"parts": [AdaLoRA(), DoRA(AdaLoRA())]}, "AdaLoRA and AdaLoRA have training procedures of their own"),
    (Together, {"rates": [1]}, r"rates is \[1\]. Set a positive number for each of the 2 parts"),
    (Together, {"rates": [1, 0]}, r"rates\[1\] is 0. Set a positive number"),
]


@in_one_item(("method", "options", "message"), OPTIONS)
def test_options(method: type[Adapter], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**options)


def test_budgets_of_methods_that_train_every_weight() -> None:
    with pytest.raises(TypeError, match="match"):
        GaLore(match="lora:32")  # type: ignore[call-arg]


SMALL = "rank 13 is larger than the smaller side 12 of fc"
SIZES: list[tuple[Adapter, tuple[int, int], str]] = [
    *((kind(rank=13), (20, 12), SMALL) for kind in (LoRA, NoLA, RandLoRA, LoRAXS, PiSSA, HiRA, HydraLoRA, AdaLoRA)),
    (AdaLoRA(rank=4, target_rank=5), (20, 12), "target_rank is 5, and fc starts with rank 4. Set .* from 1 to 4"),
    (Together([LoRA(rank=13), LoRA(rank=2)]), (20, 12), f"LoRA: {SMALL}"),
    (PRANC(coefficients=601), (30, 20), "601 coefficients are more than the 600 entries of fc; set .* to fewer"),
    (SHiRA(rank=13), (30, 20), r"rank 13 asks for more entries than fc has \(30 x 20\); choose .* up to 12"),
    (SVFT(pattern="top_k"), (48, 12), r"top_k needs square weights, fc is 48 x 12\. Set .* banded or random"),
    (SVFT(off_diagonals=12), (12, 12), "12 off-diagonals are too many for fc .* at most 11"),
    (OFT(), (20, 37), "the 37 inputs of fc have no divisor from 2 to 32. Set block 37"),
    (OFT(block=5), (20, 36), "block 5 does not divide the 36 inputs of fc into parts of 2 or more. Set block 4 or 6"),
    (OFT(block=50), (20, 36), "Set block 36"),
    (OFT(block=1), (20, 36), "block 1 does not divide the 36 inputs"),
    (OFT(), (20, 1), "Leave it out of the targets"),
]


@in_one_item(("adapter", "sides", "message"), SIZES)
def test_sizes(adapter: Adapter, sides: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inject(One(*sides[::-1]), adapter, ["fc"])
