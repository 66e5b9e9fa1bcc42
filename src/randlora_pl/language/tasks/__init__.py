"""Objectives for decoders and encoders."""

from typing import Literal

TASKS = ("CausalLMTask", "TextClassificationTask")
"""Names of the tasks on texts."""

ImportedTask = Literal["LinearHeadTask", "TextHeadTask", "VisionLanguageTask", "CausalLMTask"]
"""Tasks that an adapter of another program may be for (`Objective.adopts`)."""
