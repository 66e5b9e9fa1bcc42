from randlora_pl.language.datasets.prompt_template import Template


def test_the_prompt_has_the_shape_of_alpaca() -> None:
    assert Template(preamble="Do it.").prompt("Add 1 and 2") == (
        "Do it.\n\n### Instruction:\nAdd 1 and 2\n\n### Response:\n"
    )
    assert Template(preamble_with_input="Do it with this.").prompt("Add them", "1 and 2") == (
        "Do it with this.\n\n### Instruction:\nAdd them\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
