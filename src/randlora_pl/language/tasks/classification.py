"""Classification of texts with encoders: GLUE with RoBERTa (appendix B.1 of the paper)."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, RandLoRA
from randlora_pl.adapters.random_bases import Distribution, draw
from randlora_pl.language.glue import Metric
from randlora_pl.language.metrics import PredictionCollector, grades
from randlora_pl.language.tasks.common import TextTask
from randlora_pl.language.tokenization import (
    RANDOM,
    collate_sentences,
    encode_sentences,
    model_config,
    most_tokens,
    pad_id,
    split,
)
from randlora_pl.models.weights import evaluating, seeded
from randlora_pl.tasks.measures import ACCURACY, LOSS, Measure
from randlora_pl.tasks.optim import Factor, parameter_groups
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Positive, Probability

if TYPE_CHECKING:
    from randlora_pl.language.data import LabelledTexts
    from randlora_pl.tasks.run import Run


class TextClassificationTask(TextTask):
    """Fine-tunes an encoder of transformers to classify texts, or to score them.

    The encoder is frozen except for its adapter. The classification head trains as a whole, and is stored in the
    adapter's file.

    Attributes:
        head: The classification head.
        metric: The selected metric.
    """

    measures = (ACCURACY, *map(Measure, ("matthews", "f1", "pearson", "spearman", "combined", "score")), LOSS)
    trained_head = tied_head = True
    data_module = "randlora_pl.language.LabelledTexts"
    auto = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    example = 'print(task.classnames, task.classify(["a text"]))'
    sentences = True

    name: str = field(default="FacebookAI/roberta-base", kw_only=False)
    """A model of the Hugging Face Hub, or a folder: RoBERTa, BERT, or another with a sequence classifier."""
    adapter: Adapter = RandLoRA(rank=64)
    """The method and its options."""
    targets: list[str] | None = None
    """Layers to adapt: regular expressions over layer names of the encoder or the aliases ``qkv q k v kv o fc1 fc2 attn
    mlp all``. Default: the paper's for RoBERTa (all dense layers); q, k, v and the MLP's projections in BERT;
    every linear layer of the blocks in other families."""
    warmup_steps: int = field(init=False, default=0)
    warmup_fraction: Annotated[float, Probability] = 0.06
    """Fraction of the optimizer steps for a linear warm-up."""
    head_learning_rate: Annotated[float, Positive] | None = None
    """Peak learning rate of the head. Default: the adapter's, ``learning_rate``."""
    head_dropout: Annotated[float, Probability] = 0.0
    """Dropout of the head; the frozen encoder has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run: Run[LabelledTexts]
        self.head_learning_rate = self.head_learning_rate or self.learning_rate
        self.metric: Metric | None = None
        self.head: nn.ModuleDict

    # Building

    def set_classes(self, classnames: Sequence[str], metric: Metric | None = None) -> None:
        """Name the classes; `take_data` takes them from the data module.

        Args:
            classnames: Name of each class; empty for scores.
            metric: The selected metric; by default accuracy, Pearson's correlation for scores.

        Raises:
            UserError: There is only one, or the task was built for others.
        """
        self.check_classes(classnames, scores=True)
        self.classnames, self.has_classes = list(classnames), bool(classnames)
        self.metric = metric or ("acc" if classnames else "pearson")

    def take_data(self, stage: str) -> None:
        """Take the classes from the data module, and reset the metrics.

        Raises:
            UserError: There are none, or the task was built for others.
        """
        data = self.run.data
        if data is not None:
            self.set_classes(data.classnames, data.metric)
        if self.metric is None:
            raise UserError("the task needs a data module, or set_classes(classnames) first.")
        self.metrics = nn.ModuleDict({split: PredictionCollector() for split in ("val", "test")})
        self.metrics.to(self.device)

    def build(self) -> nn.Module:
        """Load the encoder, and make the head.

        Raises:
            UserError: The classes are not set, the model is not available or has no classification head, its encoder
                lacks weights, its vocabulary is smaller than the tokenizer's, or texts are longer than its positions.
        """
        if self.metric is None:
            raise UserError("the task needs its classes before it is built: set_classes(classnames).")
        whole = self._load()
        self.identity = self.model_identity()
        encoder, self.head = split(whole)
        for module in self.head.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.head_dropout
        self._whole = (whole,)  # not as a module of its own: its parts are, encoder and head
        self.take_targets(whole)
        most = most_tokens(encoder)
        data = self.run.data
        if most is not None and data is not None and data.longest > most:
            raise UserError(
                f"{self.name} accepts at most {most} tokens. Use --data.max_length {most} (it is {data.max_length})."
            )
        return encoder

    def _load(self) -> Any:
        """Return a sequence classifier in eval mode on the CPU, float32.

        Tensors of the head that the files lack start at N(0, initializer_range^2), biases at 0, from the seed alone; a
        head of other classes is left out. Without names of classes it gives one score.
        """
        name, classnames, seed = self.name, self.classnames, self.seed
        config = model_config(name, self.pretrained, self.config_overrides)
        from transformers import AutoModelForSequenceClassification, logging

        if type(config) not in AutoModelForSequenceClassification._model_mapping:
            raise UserError(
                f"transformers has no {config.model_type} for classification. Choose an encoder (--model.name)."
            )
        self.check_vocabulary(config)
        config.num_labels = max(1, len(classnames))
        if classnames:
            config.id2label = dict(enumerate(classnames))
            config.label2id = {label: number for number, label in config.id2label.items()}
        config.problem_type = "single_label_classification" if classnames else "regression"
        auto = AutoModelForSequenceClassification
        if self.pretrained == RANDOM:
            model = self.random_model(auto, config, pad_id(self.vocabulary))
            absent = set(model.state_dict())
        else:
            if config.pad_token_id is None:
                config.pad_token_id = pad_id(self.vocabulary)
            level = logging.get_verbosity()
            logging.set_verbosity_error()  # the head is new on purpose
            options = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
            try:
                with seeded(seed):
                    model, info = self.pretrained_model(auto, **options)
            finally:
                logging.set_verbosity(level)
            other = {each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]}
            absent = set(info["missing_keys"]) | other
            if missing := sorted(key for key in absent if key.startswith(f"{model.base_model_prefix}.")):
                raise UserError(
                    f"{name} lacks {len(missing)} tensors of its encoder, such as {missing[0]}: these weights are not "
                    f"a complete {config.model_type} encoder. Choose others (--model.name, --model.pretrained)."
                )
        for key, value in split(model)[1].named_parameters():
            if key in absent and value.dim() > 1:
                size, normal = (len(value), value[0].numel()), Distribution("normal")
                rows = draw(seed, f"head/{key}", 1, *size, normal, torch.device("cpu"))
                deviation = float(getattr(config, "initializer_range", 0.02))
                value.data.copy_(deviation * rows[0].reshape(value.shape))
            elif key in absent:
                value.data.fill_(1.0 if key.endswith("weight") else 0.0)  # of a norm
        return model.eval()

    def completed(self, backbone: nn.Module) -> Any:
        """Return the classifier of transformers: encoder, adapter and head."""
        return self._whole[0]

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """Return the encoder of a classifier."""
        return split(model)[0]

    def take_saved(self, metadata: Mapping[str, Any]) -> None:
        """Take the classes."""
        self.set_classes(metadata["classnames"])

    def rates(self) -> Mapping[str, float | None]:
        """Return the head's learning rate."""
        return {"head": self.head_learning_rate}

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the head's tensors by their names in the classifier."""
        return dict(self.head.state_dict(keep_vars=True))

    # Training

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the encoder, and the head's own."""
        return super().optimizer_groups() + parameter_groups(
            self.head.parameters(), self.head_learning_rate or 0.0, self.weight_decay, self.decay_vectors
        )

    def rate_factors(self, groups: Sequence[dict[str, Any]]) -> list[Factor]:
        """Return the schedule of each group; the warm-up is a fraction of the steps."""
        self.warmup_steps = math.ceil(self.warmup_fraction * self.run.total_steps())
        return super().rate_factors(groups)

    def class_logits(self, batch: dict[str, Any]) -> Tensor:
        """Return logits (b, classes) float32, or scores (b, 1)."""
        whole = self.completed(self.model)
        encoder: Any = self.model
        names = ["input_ids", "attention_mask"]
        if (getattr(whole.config, "type_vocab_size", 0) or 0) > 1:  # it marks the two sentences of a pair
            names.append("token_type_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        # transformers reads a mask (b, n) on the host, to leave out one without padding, and so waits for the GPU: give
        # the mask (b, 1, n, n) that the encoder itself would make.
        mask: Tensor = batch["attention_mask"]
        own = vars(sys.modules[type(encoder).__module__])
        make: Any = own.get("create_bidirectional_mask") if on_cuda(mask) else None
        known = make is not None and "allow_is_bidirectional_skip" in signature(make).parameters
        if known and encoder.config._attn_implementation in ("sdpa", "eager"):
            embedded = next(encoder.parameters()).new_empty(1).expand(*mask.shape, 1)  # for its shape, dtype and device
            inputs["attention_mask"] = make(encoder.config, embedded, mask, allow_is_bidirectional_skip=False)
        logits: Tensor = whole(**inputs).logits
        return logits.float()

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the cross-entropy and the hits; for scores the squared error alone."""
        return self._losses(self.class_logits(batch), batch["labels"])

    def _losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.classnames:
            return nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
        return (logits[:, 0] - labels) ** 2, None

    # Evaluation

    def evaluate(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        """Collect the predictions of a batch."""
        logits, counts, labels = self.class_logits(batch), batch["weight"] > 0, batch["labels"]
        predicted = logits.argmax(1) if self.classnames else logits[:, 0]
        self.meter(stage).update(predicted[counts], labels[counts], self._losses(logits, labels)[0][counts])
        results = {"label": labels, "index": batch["index"], "weight": batch["weight"]}
        return results | ({"logits": logits} if self.classnames else {})

    def final_metrics(self, stage: str) -> dict[str, Tensor | float]:
        """Return the metrics of the whole set, the selected one first and once more as ``score``, and the loss."""
        meter = self.meter(stage)
        assert self.metric is not None
        values = meter.compute()
        meter.reset()
        own = grades(self.metric, values["predicted"], values["labels"])
        return {**own, "score": own[self.metric], "loss": values["loss"]}

    def predict(self, batch: dict[str, Any]) -> Tensor:
        """Return class probabilities (b, classes), or scores (b, 1)."""
        return self.predictions(self.class_logits(batch))

    def classify(self, texts: Sequence[str | Sequence[str]], max_length: int = 128, batch_size: int = 64) -> Tensor:
        """Return probabilities (n, classes), or scores (n, 1), of texts or pairs of texts.

        Args:
            texts: Single texts, or pairs, as the task was trained on.
            max_length: Maximum number of tokens of each.
            batch_size: Texts of a batch.
        """
        sentences = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        encoded, _ = encode_sentences(self.vocabulary, sentences, max_length)
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
        pad, parts = pad_id(self.vocabulary), []
        with evaluating(self.model, self.head):
            for start in range(0, len(encoded), batch_size):
                some = [encoded[index] for index in order[start : start + batch_size]]
                batch = collate_sentences(self.vocabulary, some, pad)
                parts.append(self.predict({name: value.to(self.device) for name, value in batch.items()}))
        if not parts:
            return torch.empty(0, max(1, len(self.classnames)))
        return torch.cat(parts)[torch.tensor(order).argsort().to(self.device)]
