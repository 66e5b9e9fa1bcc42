"""The instruction prompt that commonsense models are trained on and asked with (the shape of Alpaca's)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A preamble, the instruction, the input where there is one, and the marker after which the model answers.

    The shape is Alpaca's prompt, which the paper's experiments use. The released scripts indent its lines by 16
    spaces, differently in training and in evaluation; here one clean text serves both.

    Attributes:
        preamble: First line of a prompt.
        preamble_with_input: The same where the record has an input.
        instruction: Heading of the instruction.
        input: Heading of the input.
        response: Heading after which the model's answer follows.
    """

    preamble: str = "The instruction below describes a task. Write a response that completes it."
    preamble_with_input: str = (
        "The instruction below describes a task, and an input belongs to it. Write a response that completes the task."
    )
    instruction: str = "### Instruction:"
    input: str = "### Input:"
    response: str = "### Response:"

    def prompt(self, instruction: str, given: str = "") -> str:
        """Return the text before the answer; it ends with the response marker and a line end.

        Args:
            instruction: Instruction of the prompt.
            given: The record's input; its part is left out where it is empty.
        """
        parts = [self.preamble_with_input if given else self.preamble, f"{self.instruction}\n{instruction}"]
        if given:
            parts.append(f"{self.input}\n{given}")
        return "\n\n".join([*parts, f"{self.response}\n"])
