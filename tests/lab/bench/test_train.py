from dataclasses import replace

import pytest
import torch

from randlora_pl.lab.bench import METHODS
from randlora_pl.lab.bench.steps import Setup, Training, estimated_seconds, library_of, one_training
from randlora_pl.utils.errors import UserError
from tests.support.products import marked

NAMES = list(METHODS)


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(Setup("test_vit", "timm", 2))


@pytest.mark.parametrize(("names",), marked([(NAMES[::2],), (NAMES[1::2],)], lambda row: "full" in row[0]))
def test_every_method_trains_the_same_model_on_the_same_images(training: Training, names: list[str]) -> None:
    cases, missing = training.cases(names)
    assert {case.name for case in cases} | {one.name for one in missing} == set(names)
    assert len(cases) + len(missing) == len(names) and all(one.problem for one in missing)
    before = [parameter.clone() for parameter in training.base.parameters()]
    losses = [case.loss(case.model).item() for case in cases]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)  # every update starts at zero
    for case in cases:
        case.count()
        assert case.flops > 0 and case.saved > 0 and not case.problem
        assert case.loss(case.model).item() != losses[0]
    assert all(map(torch.equal, before, training.base.parameters()))


def test_full_fine_tuning_costs_three_forward_passes(training: Training) -> None:
    full = training.case("full")
    full.count()
    forward = training.forward_flops()
    assert 2.8 * forward < full.flops < 3.1 * forward  # images need no gradient; attention has 2.5 times as much
    assert estimated_seconds(10**9, 10**9, 2, 4) == 2 * (30 + 4)


def test_the_library_is_found_by_the_name() -> None:
    assert library_of("vit_base_patch32_224") == library_of("vit_small_patch16_224.dino") == "timm"
    assert library_of("ViT-B-32") == library_of("tiny") == "open_clip"
    with pytest.raises(UserError, match="'test_vit'"):
        library_of("tets_vit")
    with pytest.raises(UserError, match="--library"):
        Training(Setup("tiny", "timm", 2))


def test_the_image_tower_of_a_clip_trains() -> None:
    training = Training(Setup("tiny", "open_clip", 2, "bf16"))
    case = training.case("randlora")
    case.count()
    assert training.words == "2 images of 32 pixels" and all(name.startswith("visual.") for name in training.layers)
    assert training.gemm().dtype == torch.bfloat16
    assert case.trained == training.case("randlora-ternary").trained


def test_a_case_that_finds_no_memory_is_missing(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setitem(METHODS, "full", replace(METHODS["full"], adapt=full))
    cases, missing = training.cases(["full"])
    assert not cases and missing[0].problem == "out of memory"
    monkeypatch.setitem(METHODS, "full", replace(METHODS["full"], adapt=lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        training.cases(["full"])


def test_a_training_for_another_process_takes_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr("randlora_pl.lab.bench.steps.Case.step", lambda self: steps.append(self.name))
    one_training(Setup("test_vit", "timm", 2, threads=torch.get_num_threads()), "lora")
    assert steps == ["lora", "lora"]


SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 100}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_decoder_trains_with_its_own_ranks() -> None:
    setup = Setup("Qwen/Qwen2-0.5B-Instruct", "transformers", 2, tokens=12, overrides=SMALL, dropout=0.1)
    training = Training(setup)
    assert training.words == "2 samples of 12 tokens"
    assert [name.rpartition(".")[2] for name in training.layers] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    ]
    names = ["full", "randlora", "peft-randlora", "lora", "peft-lora", "dora", "peft-dora"]
    cases, missing = training.cases(names)
    assert [case.label for case in cases][:3] == ["full fine-tuning", "RandLoRA-10", "PEFT RandLoRA-10"] and not missing
    trained = {case.name: case.trained for case in cases}
    assert all(trained[name] == trained[f"peft-{name}"] for name in ("randlora", "lora", "dora"))
    losses = [case.loss(case.model).item() for case in cases]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    for case in cases:
        case.count()
        assert not case.problem and case.loss(case.model).item() != losses[0]


def test_a_decoder_has_no_such_option() -> None:
    with pytest.raises(UserError, match="'num_hidden_layers'"):
        Training(Setup("Qwen/Qwen2-0.5B-Instruct", "transformers", 2, overrides={"num_hiden_layers": 1}))
