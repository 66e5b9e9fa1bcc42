from typing import Any

import pytest
import torch

from randlora_pl.lab.bench.answers import LONGEST, SHORTEST, Answers, speedups
from randlora_pl.language.models.generate import Decoding

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_write_what_one_by_one_does(beams: int) -> None:
    answers = Answers("Qwen/Qwen2-0.5B-Instruct", 5, Decoding(beams, 6), SMALL)
    lengths = [len(prompt) for prompt in answers.prompts]
    assert lengths == sorted(lengths, reverse=True) and SHORTEST <= min(lengths) < max(lengths) <= LONGEST
    torch.nn.init.normal_(answers.model.get_input_embeddings().weight)  # type: ignore[operator]
    assert answers.seconds(1) > 0 and answers.seconds(3) > 0
    assert [len(ids) for ids in answers.written[3]] == [6] * 5
    assert len({tuple(ids.tolist()) for ids in answers.written[1]}) > 1
    assert answers.equal(3) == answers.equal(1) == 5
    answers.written[3][0] = answers.written[3][0] + 1
    assert answers.equal(3) == 4


def test_one_by_one_is_the_plain_path_of_transformers() -> None:
    """Prompts as they are, without padding, each read for every beam, by `generate` alone."""
    answers = Answers("Qwen/Qwen2-0.5B-Instruct", 3, Decoding(2, 4), SMALL)
    given: list[tuple[int, ...]] = []

    def note(module: Any, args: Any, options: dict[str, Any]) -> None:
        given.append(tuple(options["input_ids"].shape))

    with answers.model.register_forward_pre_hook(note, with_kwargs=True):
        answers.seconds(1)
    assert [shape for shape in given if shape[1] > 1] == [(2, len(prompt)) for prompt in answers.prompts]
    for prompt, written in zip(answers.prompts, answers.written[1], strict=True):
        ids = torch.tensor([prompt])
        model: Any = answers.model
        plain = model.generate(ids, num_beams=2, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert plain[0, len(prompt) :].tolist() == written.tolist()


def test_gains_are_taken_round_by_round() -> None:
    assert speedups({1: [8.0, 6.0], 4: [2.0, 3.0]}) == {1: [1.0, 1.0], 4: [4.0, 2.0]}
