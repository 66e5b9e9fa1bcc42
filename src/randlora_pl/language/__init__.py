"""The language experiments: text data, prompts, answers and scores, for which the extra ``language`` is needed.

`catalog` imports no PyTorch, so that listing the datasets is instant; what is exported here is loaded on first use.

Examples:
    >>> from randlora_pl.adapters import RandLoRA
    >>> from randlora_pl.language import CausalLMTask, TextData, load_language_task
    >>> from randlora_pl.tasks import AdaptationModule, make_trainer
    >>> small = {"num_hidden_layers": 2, "hidden_size": 112, "intermediate_size": 128, "vocab_size": 300}
    >>> task = CausalLMTask("Qwen/Qwen2-0.5B-Instruct", "random", config_overrides=small)  # without both: its weights
    >>> make_trainer().fit(AdaptationModule(task), TextData(dataset="jsonl", root="prompts", steps=2))
    >>> task.save("answering")
    >>> (answer,) = load_language_task("answering").write(["2 and one is"])

    >>> from randlora_pl.language import LabelledTexts, TextClassificationTask
    >>> small = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    >>> task = TextClassificationTask("FacebookAI/roberta-base", "random", config_overrides=small)
    >>> make_trainer().fit(AdaptationModule(task), LabelledTexts(dataset="csv", root="films", steps=2))
    >>> task.save("rating")
    >>> load_language_task("rating").classify(["a fine film"]).shape
    torch.Size([1, 2])
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.language.data import LabelledTexts, TextData
    from randlora_pl.language.tasks.causal_lm import CausalLMTask
    from randlora_pl.language.tasks.classification import TextClassificationTask
    from randlora_pl.language.tasks.common import load_language_task

__getattr__, __dir__ = lazy_exports(__name__, __file__)
