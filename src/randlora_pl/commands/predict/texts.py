"""``predict --texts``: answers of decoders to prompts, and classes or scores of texts, from adapter files alone."""

from typing import TYPE_CHECKING, Any

from randlora_pl.commands.common.devices import advised, pick_device
from randlora_pl.commands.predict.arguments import PredictOptions
from randlora_pl.language import prediction_inputs as inputs
from randlora_pl.serving.prediction_table import PredictionTable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.machine import use_precision

if TYPE_CHECKING:
    from randlora_pl.adapters import AdapterFile

_BATCH = {"CausalLMTask": 16, "TextClassificationTask": 64}
"""Texts at a time, as in a test."""
_MAX_LENGTH = 128
"""Most tokens of a text if the adapter does not contain the limit of its training."""


def answer(options: PredictOptions) -> PredictionTable:
    """Return the predictions of each adapter for each text; adapters run in turn, each with its own base model.

    All inputs are read and checked before the first model is loaded.
    """
    from randlora_pl.language.loading import need_transformers

    need_transformers()
    from randlora_pl.adapters import read_adapter
    from randlora_pl.utils.text.console import log_to_terminal

    log_to_terminal()  # logs how many texts are cut
    use_precision(options.precision, pick_device(options.device))  # refused before a model is loaded
    files = {name: read_adapter(path) for name, path in options.adapters.items()}
    kinds = {(file.metadata["task"], bool(file.metadata["classnames"])) for file in files.values()}
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(files)} have different outputs (text, classes, scores). Predict with each kind separately."
        )
    ((kind, classes),) = kinds
    decoder = kind == "CausalLMTask"
    _check_options(options, decoder, classes)
    size = options.batch_size or _BATCH[kind]
    kinds_of_text = inputs.PROMPTS if decoder else inputs.SENTENCES
    given = [each for source in options.texts for each in inputs.read_given(source, kinds_of_text)]
    with advised(f"--batch-size {size // 2}" if size > 1 else "--precision bf16"):
        return _written(options, files, given, size) if decoder else _classified(options, files, given, size, classes)


def _check_options(options: PredictOptions, decoder: bool, classes: bool) -> None:
    """Refuse options that are for another kind of model."""
    for name, typed, fits in (
        ("max_new_tokens", "--max-new-tokens needs a model that generates text", decoder),
        ("beams", "--beams needs a model that generates text", decoder),
        ("top_k", "--top-k needs a model that predicts classes", classes),
    ):
        if getattr(options, name) is not None and not fits:
            raise UserError(f"{typed}, and {next(iter(options.adapters.values()))} is not one. Remove the option.")


def _written(
    options: PredictOptions, files: "dict[str, AdapterFile]", given: list[inputs.Given], size: int
) -> PredictionTable:
    """Return the answers of decoders."""
    from randlora_pl.language.tasks.causal_lm import paragraph

    datasets = {name: str(file.metadata.get("training", {}).get("dataset", "")) for name, file in files.items()}
    prompts = {name: [inputs.prompt_of(each, dataset) for each in given] for name, dataset in datasets.items()}
    asked = [[inputs.shown(each)] for each in given]
    found = PredictionTable(list(files), "prompts", ["prompt"], asked, ["written"], "")
    typed = {"max_new_tokens": options.max_new_tokens, "num_beams": options.beams}
    how = {name: value for name, value in typed.items() if value is not None}
    notes = set()
    for name, file in files.items():
        task = _ready(file, options, how)
        described = datasets[name] == "e2e"
        with use_precision(options.precision, pick_device(options.device)):
            texts = task.write(prompts[name], size, separate=described)
        for number, text in enumerate(texts):
            found.add(name, number, [paragraph(text) if described else text])
        notes.add(f"at most {task.max_new_tokens} tokens after each")
        del task  # before the next one is loaded
    found.note = " or ".join(sorted(notes))
    return found


def _classified(
    options: PredictOptions, files: "dict[str, AdapterFile]", given: list[inputs.Given], size: int, classes: bool
) -> PredictionTable:
    """Return classes with their probabilities, or scores."""
    from randlora_pl.language.classifier import most_tokens
    from randlora_pl.tasks.evaluation import check_numbers

    sentences = [inputs.sentences_of(each) for each in given]
    for each, texts in zip(given, sentences, strict=True):
        if len(texts) != len(sentences[0]):
            raise UserError(f"{each.where}: single texts and pairs are mixed. Predict them separately.")
    pairs = len(sentences[0]) > 1
    columns = ["text_a", "text_b"] if pairs else ["text"]
    for file in files.values():
        trained = file.metadata.get("training", {}).get("pairs", pairs)
        if trained != pairs:
            what, names = ("pairs", "text_a and text_b") if trained else ("single texts", "text")
            raise UserError(f"{file.path} was trained on {what}: give records with {names}, as in its training.")
    if classes:
        count = max(min(options.top_k or 5, len(file.metadata["classnames"])) for file in files.values())
        found = PredictionTable.of_classes(list(files), "texts", columns, sentences, count)
    else:
        found = PredictionTable(list(files), "texts", columns, sentences, ["score"], "a score of each")
    for name, file in files.items():
        task = _ready(file, options, {})
        length = int(file.metadata.get("training", {}).get("max_length", _MAX_LENGTH))
        length = min(length, most_tokens(task.model) or length)
        with use_precision(options.precision, pick_device(options.device)):
            probabilities = task.classify(sentences, length, size).float().cpu()
        if classes:
            found.add_classes(name, range(len(given)), task.classnames, probabilities)
        else:
            check_numbers(probabilities, name)
            for number, score in enumerate(probabilities[:, 0].tolist()):
                found.add(name, number, [f"{score:.6f}"])
        del task
    return found


def _ready(file: "AdapterFile", options: PredictOptions, how: dict[str, Any]) -> Any:
    """Return the task of an adapter on the device, merged; quantized as in its training if there is a GPU."""
    from randlora_pl.adapters import FullFineTuning
    from randlora_pl.language.tasks.restore import plain_task
    from randlora_pl.tasks.restore import make_ready

    if options.pretrained:
        how = {**how, "pretrained": str(options.pretrained[-1])}
    if options.precision == "bf16" and not isinstance(file.adapter, FullFineTuning):  # which has nothing frozen to cast
        how = {**how, "frozen_dtype": "bfloat16"}
    device = pick_device(options.device)
    task = plain_task(file, dequantized=device.type != "cuda", **how)
    return make_ready(task, file).to(device)
