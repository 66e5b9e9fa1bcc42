import pytest
import torch

from randlora_pl.lab.bench.captions import BASES, Captions
from randlora_pl.utils.errors import UserError
from tests.tasks.small import two_blocks


@pytest.fixture(scope="module")
def captions() -> Captions:
    with two_blocks():
        return Captions("tiny", batch_size=12, classes=3)


def test_both_ways_are_one_loss_with_one_gradient(captions: Captions) -> None:
    unique, each = (captions.loss(captions.model, way) for way in (True, False))
    assert torch.allclose(unique, each, rtol=1e-5)
    trained = [parameter for parameter in captions.model.parameters() if parameter.requires_grad]
    pairs = zip(torch.autograd.grad(unique, trained), torch.autograd.grad(each, trained), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-6) for one, other in pairs)


def test_unique_captions_cost_a_part_of_the_text_tower(captions: Captions) -> None:
    cases = {case.name: case for case in captions.cases()}
    for case in cases.values():
        case.count()
    assert set(BASES) | set(BASES.values()) == set(cases)
    each, unique = cases["text-each"].flops, cases["text-unique"].flops
    caption = (each - unique) / 9
    built = unique - 3 * caption  # what captions have in common: the weights, built once both ways
    assert 0 < built < unique < each
    assert cases["unique"].flops < cases["each"].flops and cases["unique"].saved < cases["each"].saved


def test_cases_train_models_of_their_own(captions: Captions) -> None:
    first, second, *_ = captions.cases()
    first.step()
    changed = {name for name, p in first.model.named_parameters() if p.requires_grad}
    for name, parameter in second.model.named_parameters():
        same = parameter is dict(first.model.named_parameters())[name]
        assert same != (name in changed)


def test_text_towers_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="tiny"):
        Captions("tinny")
    with pytest.raises(UserError, match="captions"):
        Captions("test_vit")
    from randlora_pl.models import clip

    loaded = clip.load_clip("tiny", "random")
    del loaded.model.positional_embedding
    monkeypatch.setattr(clip, "load_clip", lambda *_: loaded)
    with pytest.raises(UserError, match="another"):
        Captions("tiny")
