import pytest
import torch

from randlora_pl.bench.answers import LONGEST, SHORTEST, Answers, speedups
from randlora_pl.language.generate import Decoding

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


def test_gains_are_taken_round_by_round() -> None:
    assert speedups({1: [8.0, 6.0], 4: [2.0, 3.0]}) == {1: [1.0, 1.0], 4: [4.0, 2.0]}
