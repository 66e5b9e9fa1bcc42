import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_pl.models.clip import LoadedClip, load_clip
from randlora_pl.models.text import cached_text_head, class_prompts, encode_prompts
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.machine import cache_folder

NAMES = ["cat", "dog", "a {strange} name"]
TEMPLATES = ["a photo of a {}.", "{}", "the {} again"]


@pytest.fixture(scope="module")
def clip(small_models: None) -> LoadedClip:
    return load_clip("Small", seed=2)


def head_of(clip: LoadedClip, names: list[str] = NAMES, templates: list[str] = TEMPLATES) -> torch.Tensor:
    return cached_text_head(clip.model, clip.tokenizer, names, templates, "cpu", clip.identity)


def files() -> list[Path]:
    return sorted((cache_folder() / "text_heads").glob("*"))


def test_prompts_go_class_by_class() -> None:
    assert class_prompts(["a", "b"], ["x {}", "{}!"]) == ["x a", "a!", "x b", "b!"]
    assert class_prompts(["{}"], ["{} {}"]) == ["{} {}"]


@pytest.mark.parametrize(("names", "templates"), [([], ["{}"]), (["a"], []), (["a"], ["a photo"])])
def test_prompts_that_cannot_be_made(names: list[str], templates: list[str]) -> None:
    with pytest.raises(UserError, match="photo"):
        class_prompts(names, templates)


def test_classes_that_the_text_tower_cannot_tell_apart_are_refused(clip: LoadedClip) -> None:
    long = f"a {'very ' * 90}"
    for names, templates in ((["red", "blue"], ["a {}", long + "{}"]), ([long + "red", long + "blue"], ["a {}"])):
        with pytest.raises(UserError, match=r"the text tower reads \d+ tokens"):
            encode_prompts(clip.model, clip.tokenizer, names, templates, "cpu")
    assert len(encode_prompts(clip.model, clip.tokenizer, ["red", "Red", "red"], ["a {}"], "cpu")) == 3


def test_embeddings_equal_a_slow_loop(clip: LoadedClip) -> None:
    rows = []
    for name in NAMES:
        embedded = []
        for template in TEMPLATES:
            tokens = clip.tokenizer([template.replace("{}", name)])
            vector = clip.model.encode_text(tokens)[0]
            embedded.append(vector / vector.norm())
        mean = torch.stack(embedded).mean(0)
        rows.append(mean / mean.norm())
    for batch in (1, 2, 4, 256):
        head = encode_prompts(clip.model, clip.tokenizer, NAMES, TEMPLATES, "cpu", batch)
        torch.testing.assert_close(head, torch.stack(rows), atol=1e-6, rtol=1e-5)
        assert not head.requires_grad
        assert not head.is_inference()  # it must be usable in a training graph
    templates = [lambda name, t=t: t.replace("{}", name) for t in TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, NAMES, templates)
    torch.testing.assert_close(head.T, theirs)


def test_the_result_is_float32_whatever_surrounds_it(clip: LoadedClip) -> None:
    plain = encode_prompts(clip.model, clip.tokenizer, NAMES, TEMPLATES, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_prompts(clip.model, clip.tokenizer, NAMES, TEMPLATES, "cpu"), plain)
    half = load_clip("Small", seed=2)
    half.model.bfloat16()
    head = encode_prompts(half.model, half.tokenizer, NAMES, TEMPLATES, "cpu")
    assert head.dtype == torch.float32
    torch.testing.assert_close(head.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(head, plain, atol=0.03, rtol=0)


class Dropping(nn.Module):
    """A text tower that differs between training and evaluation, with a part that stays in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.drop(F.one_hot(tokens, 9).float().sum(1)))


def test_runs_in_eval_mode_and_restores_each_module() -> None:
    model = Dropping()

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text) % 9] for text in texts])

    head = encode_prompts(model, tokenizer, ["a", "bb"], ["{}"], "cpu")
    assert torch.equal(head, F.one_hot(torch.tensor([1, 2]), 9).float())
    assert model.training
    assert model.drop.training
    assert not model.frozen.training


def test_the_cache_is_used_and_exact(clip: LoadedClip, monkeypatch: pytest.MonkeyPatch) -> None:
    first = head_of(clip)
    assert torch.equal(first, encode_prompts(clip.model, clip.tokenizer, NAMES, TEMPLATES, "cpu"))
    assert [path.suffix for path in files()] == [".safetensors"]

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr(clip.model, "encode_text", fail)
    assert torch.equal(head_of(clip), first)


def test_everything_that_decides_the_result_is_in_the_key(clip: LoadedClip) -> None:
    head_of(clip)
    other = load_clip("Small", seed=2)
    other.model.visual.class_embedding.data += 1  # the image tower does not
    head_of(other)
    assert len(files()) == 1
    head_of(clip, NAMES[:2])
    head_of(clip, NAMES, TEMPLATES[:2])
    head_of(clip, NAMES[::-1])
    head_of(load_clip("Small", seed=3))
    head_of(load_clip("Small-quickgelu", seed=2))  # the same weights with another activation
    assert len(files()) == 6
    changed = load_clip("Small", seed=2)
    bias: torch.Tensor = changed.model.state_dict()["transformer.resblocks.1.mlp.c_fc.bias"]
    bias[-1] += 1e-6  # one number
    new = head_of(changed)
    assert len(files()) == 7
    assert torch.equal(new, encode_prompts(changed.model, changed.tokenizer, NAMES, TEMPLATES, "cpu"))


def test_damaged_files_are_never_trusted(clip: LoadedClip, caplog: pytest.LogCaptureFixture) -> None:
    expected = head_of(clip)
    path = files()[0]
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[-1] ^= 1  # one bit of one number: still a valid file
    other = load_file(path)["head"].flip(0)
    for content in (b"", b"garbage", whole[: len(whole) // 2], bytes(altered), None):
        if content is None:
            save_file({"head": other}, path)  # whole, but without our digest
        else:
            path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "randlora_pl"):
            assert torch.equal(head_of(clip), expected)
        assert "damaged" in caplog.text
        assert torch.equal(load_file(path)["head"], expected)
    save_file({"other": other}, path)
    assert torch.equal(head_of(clip), expected)


def test_the_folder_is_the_systems_unless_told_and_may_be_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: LoadedClip, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("RANDLORA_PL_CACHE")
    assert "randlora-pl" in str(cache_folder())
    (tmp_path / "taken").write_text("a file, not a folder")
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "taken"))
    assert head_of(clip).shape == (3, 24)
    assert "cannot be cached" in caplog.text
