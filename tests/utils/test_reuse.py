import torch

from randlora_pl.models import load_clip, load_vit
from randlora_pl.utils.reuse import cached, cached_copy, caching
from tests.tasks.small import built


def test_nothing_is_kept_unless_asked_for() -> None:
    assert cached("a", 1, object) is not cached("a", 1, object)


def test_the_last_of_each_kind_is_kept() -> None:
    with caching():
        first, other = cached("a", 1, object), cached("b", 1, object)
        assert cached("a", 1, object) is first and cached("b", 1, object) is other
        second = cached("a", 2, object)
        assert second is not first and cached("a", 1, object) is not first
        with caching():
            assert cached("b", 1, object) is other
        assert cached("b", 1, object) is other
    with caching():
        assert cached("b", 1, object) is not other


def test_changes_to_a_copy_do_not_last() -> None:
    with caching():
        copy = cached_copy("list", 1, lambda: [1])
        copy.append(2)
        assert cached_copy("list", 1, lambda: [3]) == [1]


def test_a_kept_clip_is_bit_identical_whatever_was_done_to_the_one_before() -> None:
    plain = load_clip("tiny").model.state_dict()
    with caching():
        ruined = load_clip("tiny")
        with torch.no_grad():
            for parameter in ruined.model.parameters():
                parameter.fill_(7)
        again = load_clip("tiny").model
    assert all(torch.equal(value, plain[name]) for name, value in again.state_dict().items())
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in ruined.model.parameters()}


def test_models_that_differ_are_not_taken_for_each_other() -> None:
    with caching():
        weights = {
            (pretrained, seed): load_clip("tiny", pretrained, seed=seed).model.state_dict()["text_projection"]
            for pretrained, seed in (("random", 1), ("random", 2), ("emoji-fashion", 1))
        }
        again = load_clip("tiny", "emoji-fashion", seed=9).model.state_dict()["text_projection"]
        assert torch.equal(again, weights["emoji-fashion", 1])
    values = list(weights.values())
    assert not any(torch.equal(values[a], values[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_kept_timm_model() -> None:
    with caching():
        first, second = (load_vit("test_vit", "random", seed=1).model for _ in range(2))
    assert first is not second
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_text_head_is_made_once() -> None:
    with caching():
        heads = [built("text head", method).head for method in ("lora", "randlora")]
    alone = built("text head", "lora").head
    assert all(torch.equal(head, alone) for head in heads) and heads[0].data_ptr() != heads[1].data_ptr()
