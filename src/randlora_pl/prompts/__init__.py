"""Prompt learners: learned tokens in the place of words, and beside the patches of an image.

Examples:
    >>> task = PromptTask("tiny", prompts=CoOp(length=4, words=None))
    >>> make_trainer().fit(task, ImageData(dataset="digits", steps=2))
"""

from randlora_pl.prompts.base import Fixed, PromptLearner, Prompts
from randlora_pl.prompts.coop import CoCoOp, CoOp, DeepPrompts, MaPLe

__all__ = ["CoCoOp", "CoOp", "DeepPrompts", "Fixed", "MaPLe", "PromptLearner", "Prompts"]
