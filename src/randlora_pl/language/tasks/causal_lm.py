"""Decoders that learn to continue prompts, and the generated texts of a test, gathered from all processes."""

import importlib.util
from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from randlora_pl.adapters import Adapter, RandLoRA
from randlora_pl.language.chat import Chat, Conversation, Turns, turns_of
from randlora_pl.language.chat_template import ChatTemplate
from randlora_pl.language.decoder import (
    Decoding,
    check_apart,
    check_positions,
    choose_options,
    token_losses,
    write_texts,
)
from randlora_pl.language.metrics import generation_scores
from randlora_pl.language.prompt_sets import Item
from randlora_pl.language.tasks.common import TextTask
from randlora_pl.language.tokenization import IGNORED, RANDOM, Encoded, collate, encode_prompt, model_config, pad_id
from randlora_pl.models.weights import evaluating
from randlora_pl.tasks.measures import ACCURACY, LOSS, Measure
from randlora_pl.tasks.quantize import FORMS
from randlora_pl.utils.errors import UserError, install
from randlora_pl.utils.options import Count, NotNegative, Positive, Probability, between

if TYPE_CHECKING:
    from randlora_pl.language.data import TextData
    from randlora_pl.tasks.run import Run


def paragraph(text: str) -> str:
    """Return the first paragraph.

    The scripts that E2E's come from stop at an empty line, too (their second end of text, token 628 of GPT-2).
    """
    return text.partition("\n\n")[0].strip()


class CausalLMTask(TextTask):
    """Fine-tunes a decoder of transformers to write completions.

    The loss of an optimizer step is the mean over its learned tokens, or over its samples, exactly: also with gradient
    accumulation, on several devices, and where samples are of different lengths.

    Attributes:
        written: A record of each question of the last test: the model's text and its grade.
    """

    measures = (
        ACCURACY,
        LOSS,
        Measure("unfound", "without an answer", mode="min", validated=False),
        *(Measure(name, decimals=2, validated=False) for name in ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")),
    )
    has_classes = False
    answer = "written"
    data_module = "randlora_pl.language.TextData"
    auto = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    example = 'print(task.write(["a prompt"]))  # or a conversation: [{"role": "user", "content": "a question"}]'
    generates = True
    adopts = "decoder"
    peft_type = "CAUSAL_LM"
    batch_size = 16

    name: str = field(default="Qwen/Qwen2-0.5B-Instruct", kw_only=False)
    """A model of the Hugging Face Hub, a folder, or ``smollm2``, whose weights a package index has."""
    quantize: Literal["int8", "int4", "8bit", "4bit"] | None = None  # type: ignore[assignment]  # of more libraries
    """Frozen linear layers in ``int8`` or, if the device supports it, ``int4`` (extra ``torchao``), or on a GPU in
    ``8bit`` or ``4bit`` (bitsandbytes, extra ``quantize``). They are never merged."""
    liger: bool = False
    """Norms, rotary angles and activations by Liger-Kernel (extra ``liger``, needs a GPU)."""
    adapter: Adapter = RandLoRA(rank=10)
    """The method and its options."""
    targets: list[str] | None = None
    """Layers to adapt: regular expressions over layer names or the aliases ``qkv q k v kv o fc1 fc2 attn mlp all``.
    Default: the paper's for its families of models (q, k, v, and the MLP's up and down projections; q, v and both of
    the MLP in GPT-2), and every linear layer of the blocks in other families."""
    adam_eps: Annotated[float, Positive] = 1e-8
    """Epsilon of AdamW."""
    loss_average: Literal["tokens", "samples"] = "tokens"
    """``tokens`` gives every learned token of an optimizer step equal weight, ``samples`` every sample."""
    label_smoothing: Annotated[float, Probability] = 0.0
    """Fraction of each label that is spread over the vocabulary."""
    evaluation: Literal["generate", "likelihood"] = "generate"
    """How tests are answered: ``generate`` writes answers, ``likelihood`` selects the likeliest option."""
    num_beams: Annotated[int, between(1, 1000)] = 1
    """Beams of the search, 1 for greedy (4 in the paper's scripts)."""
    max_new_tokens: Count = 32
    """Maximum number of tokens per answer."""
    length_penalty: float = 1.0
    """Exponent of the length by which a beam's log-likelihood is divided."""
    no_repeat_ngram: Annotated[int, NotNegative] = 0
    """Length of token sequences that are never written twice. 0 disables the rule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run: Run[TextData]
        self.written: list[dict[str, Any]] = []
        self._texts: dict[int, str] = {}

    def build(self) -> nn.Module:
        """Load the decoder.

        Raises:
            UserError: The model is not available, its vocabulary is smaller than the tokenizer's, or a package or
                device for an option is missing.
        """
        self.identity = self.model_identity()
        model = self._load()
        if self._packs():
            check_apart(model)
        if self.liger:
            # The linear layers stay modules, so that they can be adapted. Liger's loss is not used: `token_losses`
            # needs the loss of each token. Rotary angles are replaced for every model of this kind in the process.
            if importlib.util.find_spec("liger_kernel") is None:
                raise UserError(f"--model.liger needs liger-kernel: {install('liger')}")
            cuda = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            device = cuda if self.run.precision is None else self.run.device
            if device.type != "cuda":
                what = f"--model.liger needs a CUDA device, and the model runs on {device.type}"
                raise UserError(f"{what}. Remove the option.")
            from liger_kernel.transformers import monkey_patch

            kind = model.config.model_type
            if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
                raise UserError(f"--model.liger: Liger-Kernel has no kernels for {kind}. Remove the option.")
            monkey_patch._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        self.take_targets(model)
        decoder: nn.Module = model
        return decoder

    def _load(self) -> Any:
        """Return a decoder with its output layer, in eval mode on the CPU."""
        name, dtype = self.name, getattr(torch, self.chosen_dtype())
        config = model_config(name, self.pretrained, self.config_overrides)
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

        if config.model_type == "cpmant":  # it reads its own mask from the tokens, and training pads on the right
            raise UserError(f"{name} (cpmant) needs padding on the left. Choose another decoder (--model.name).")
        # transformers builds BERT, RoBERTa and similar encoders as decoders that read ahead
        if config.model_type in ENCODERS and not getattr(config, "is_decoder", True) and not config.is_encoder_decoder:
            raise UserError(
                f"{name} is an encoder ({config.model_type}), which sees the text after each token and cannot learn "
                "to write. Choose a decoder (--model.name), or for classes --model TextClassificationTask."
            )
        self.check_vocabulary(config)
        bits = None if self.quantize in FORMS else self.quantize  # torchao quantizes what is loaded
        if self.pretrained == RANDOM:
            if bits:
                raise UserError(
                    f"--model.quantize {bits} needs pretrained weights. Remove it with --model.pretrained random."
                )
            return self.random_model(AutoModelForCausalLM, config, self.vocabulary.pad_token_id).to(dtype).eval()
        options: dict[str, Any] = {"dtype": dtype}
        if bits is not None:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(f"--model.quantize {bits} needs bitsandbytes: {install('quantize')}")
            if not torch.cuda.is_available():
                what = f"--model.quantize {bits} needs a CUDA device, and none is available"
                raise UserError(f"{what}. Remove the option.")
            products = torch.bfloat16 if self.run.precision == "bf16-mixed" else dtype
            four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": products}
            how = four if bits == "4bit" else {"load_in_8bit": True}
            options["quantization_config"] = BitsAndBytesConfig(**how)
        model, loaded = self.pretrained_model(AutoModelForCausalLM, **options)
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(
                f"{self.pretrained or name} lacks {len(missing)} tensors of {type(model).__name__}, such as "
                f"{missing[0]}: they would be random. Give a folder or a name with the weights of a decoder."
            )
        return model.eval()

    def take_data(self, stage: str) -> None:
        """Make the running metrics; tests have metrics by their names.

        Raises:
            UserError: A question has no options to choose from; raised before a training.
        """
        names = ["val/loss", "val/acc"]
        items = getattr(self.run.data, "items", [])
        if self.evaluation == "likelihood" and not all(item.options for item in items):
            raise UserError("--model.evaluation likelihood needs questions with options. Use generate.")
        if self.loss_average == "samples" and self._packs():
            raise UserError("--model.loss_average samples needs samples that are not joined. Remove --data.packing.")
        if stage == "test":
            graded = dict.fromkeys(item.task for item in items if not item.references)
            names = [f"{kind}/{task}" for task in graded for kind in ("acc", "unfound")]
            self.written, self._texts = [], {}
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in names})
        self.metrics.to(self.device)

    def _packs(self) -> bool:
        data = self.run.data
        return data is not None and data.plan is not None and bool(getattr(data, "packing", False))

    # Training

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of what trains, with AdamW's epsilon."""
        return [{**group, "eps": self.adam_eps} for group in super().optimizer_groups()]

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the mean loss (b,) of each sample's learned tokens, and the fraction of them predicted right (b,)."""
        smoothing = self.label_smoothing if self.training else 0.0
        losses, right, counted = token_losses(self.model, batch, smoothing)
        count = counted.sum(1).clamp(min=1)
        loss: Tensor = losses.sum(1) / count
        return loss, (right & counted).sum(1) / count

    def loss_weights(self, batch: dict[str, Any]) -> Tensor:
        """Return weights (b,) that make the sum over micro-batches and devices the mean over tokens or samples."""
        weight: Tensor = batch["weight"]
        if self.loss_average == "samples":
            return weight
        relative_length: Tensor = _learned(batch) * (batch["step_samples"] / batch["step_tokens"])
        return weight * relative_length

    # Evaluation

    def evaluate(self, batch: dict[str, Any], stage: str) -> dict[str, Any] | None:
        """Update loss and accuracy of the next token in a validation; in a test answer questions and grade them."""
        if stage == "test":
            return self._graded(batch)
        losses, right = self.sample_losses(batch)
        weight = (batch["weight"] > 0).float()
        weight = weight if self.loss_average == "samples" else weight * _learned(batch)
        self.meter("val/loss").update(losses, weight)
        self.meter("val/acc").update(right, weight)
        return None

    def _graded(self, batch: dict[str, Any]) -> dict[str, Any]:
        numbers = batch["index"].tolist()
        data = self.run.data
        assert data is not None
        items = [data.items[number] for number in numbers]
        answers = zip(items, self.write_answers(batch, items), strict=True)
        # of a description the first paragraph is scored, of an answer all
        texts = [paragraph(text) if item.references else text for item, text in answers]
        for number, item, text, counts in zip(numbers, items, texts, (batch["weight"] > 0).tolist(), strict=True):
            if counts:
                self._texts[number] = text
            if counts and not item.references:
                answer = item.find_answer(text)
                self.meter(f"acc/{item.task}").update(float(answer == item.answer))
                self.meter(f"unfound/{item.task}").update(float(not answer))
        return {"index": batch["index"], "texts": texts}

    def write_answers(self, batch: dict[str, Any], items: list[Item]) -> list[str]:
        """Return the generated text after each prompt, or the likeliest option.

        Raises:
            UserError: An answer might not fit into the model.
        """
        assert self.run.data is not None
        pad = self.run.data.pad
        if self.evaluation == "generate":
            return write_texts(self.model, self.vocabulary, batch, self._decoding, pad)
        prompts = [encode_prompt(self.vocabulary, item.prompt) for item in items]
        options = [
            [self.vocabulary(text, add_special_tokens=False)["input_ids"] for text in item.completions]
            for item in items
        ]
        chosen = choose_options(self.model, prompts, options, pad, self.device)
        return [item.options[number] for item, number in zip(items, chosen, strict=True)]

    def write(self, prompts: Sequence[str | Chat], batch_size: int = 16, separate: bool = False) -> list[str]:
        """Return the generated texts after prompts, in their order; the same as in a test.

        Args:
            prompts: Texts to continue, or conversations to answer (messages with ``role`` and ``content``, the user's
                last), in the model's chat template; never cut, and equal ones are read once.
            batch_size: Texts of a batch.
            separate: Close each prompt by an end of text, as in a training on E2E.

        Raises:
            UserError: A prompt has no token, one is too long for the model's positions, or a message is wrong.
        """
        asked: list[str | Turns] = []
        tokens: dict[str | Turns, list[int]] = {}
        template = None
        for number, prompt in enumerate(prompts, 1):
            where = f"prompt {number}"
            asked.append(prompt if isinstance(prompt, str) else Conversation(turns_of(prompt, where), where).asked)
            if isinstance(read := asked[-1], str):
                tokens[read] = tokens.get(read) or encode_prompt(self.vocabulary, read, separate)
            else:
                template = template or ChatTemplate(self.vocabulary)
                tokens[read] = tokens.get(read) or template.tokens(template.question(read, where))
        if empty := sum(not tokens[prompt] for prompt in asked):
            raise UserError(f"{empty:,} of {len(prompts):,} prompts have no token.")
        # Neighbors of one length need little padding, and one that is too long raises an error at once.
        order = sorted(tokens, key=lambda prompt: -len(tokens[prompt]))
        pad = pad_id(self.vocabulary)
        texts: dict[str | Turns, str] = {}
        with evaluating(self.model):
            for start in range(0, len(order), batch_size):
                some = order[start : start + batch_size]
                batch = collate([Encoded(tokens[prompt], tokens[prompt], 0) for prompt in some], pad)
                here = {name: value.to(self.device) for name, value in batch.items()}
                written = write_texts(self.model, self.vocabulary, here, self._decoding, pad)
                texts |= dict(zip(some, written, strict=True))
        return [texts[prompt] for prompt in asked]

    @property
    def _decoding(self) -> Decoding:
        return Decoding(self.num_beams, self.max_new_tokens, self.length_penalty, self.no_repeat_ngram)

    def final_metrics(self, stage: str) -> dict[str, Tensor | float]:
        """Return accuracy and the rate of texts without an answer of each test, and their unweighted means (Table 15).

        Texts with references have scores of the corpus instead, which one process computes from the texts of all.
        """
        if stage == "val":  # all are running metrics
            return {}
        assert self.run.data is not None
        items, parts = self.run.data.items, [self._texts]  # of all processes
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self._texts)
        texts = dict(sorted((number, text) for part in parts for number, text in part.items()))
        self.written = [items[number].record(text) for number, text in texts.items()]
        scores: dict[str, float] = {}
        scored = [(text, items[number].references) for number, text in texts.items() if items[number].references]
        if scored and self.run.rank == 0:
            scores = generation_scores(*zip(*scored, strict=True))
        graded: dict[str, Tensor | float] = self.run.broadcast(scores)
        values = {key: self.meter(key).compute() for key in self.metrics}
        for kind in ("acc", "unfound"):
            own = {key: value for key, value in values.items() if key.startswith(f"{kind}/")}
            if own:
                graded[kind] = torch.stack(list(own.values())).mean()
            if len(own) > 1:
                graded |= own
        return graded

    def adapt(self) -> None:
        """Build the model, and refuse samples that are longer than it reads, before a run stores its options."""
        super().adapt()
        data = self.run.data
        lengths = None if data is None or data.plan is None else getattr(data, "lengths", {}).get("train")
        if lengths is not None:
            check_positions(self.model, torch.ones(1, min(lengths.longest, lengths.cutoff), dtype=torch.int64))


def _learned(batch: dict[str, Any]) -> Tensor:
    labels: Tensor = batch["labels"]
    return (labels[:, 1:] != IGNORED).sum(1)
