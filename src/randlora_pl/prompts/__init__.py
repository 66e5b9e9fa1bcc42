"""Prompt learners: learned tokens in the place of words, and beside the patches of an image.

Examples:
    >>> task = PromptTask("tiny", prompts=CoOp(length=4, words=None))
    >>> make_trainer().fit(task, ImageData(dataset="digits", steps=2))
"""

from randlora_pl.prompts.base import PromptLearner, Prompts
from randlora_pl.prompts.cocoop import CoCoOp
from randlora_pl.prompts.coop import CoOp
from randlora_pl.prompts.deep import DeepPrompts
from randlora_pl.prompts.fixed import Fixed
from randlora_pl.prompts.maple import MaPLe

__all__ = ["CoCoOp", "CoOp", "DeepPrompts", "Fixed", "MaPLe", "PromptLearner", "Prompts"]
