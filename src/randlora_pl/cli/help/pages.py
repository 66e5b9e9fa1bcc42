"""Help pages of the commands, from the source text: the application's own options first, on one screen."""

import re

from randlora_pl.cli.common.tables import entry
from randlora_pl.cli.help.adapter import PAGE as ADAPTER
from randlora_pl.cli.help.analyze import PAGE as ANALYZE
from randlora_pl.cli.help.compare_runs import PAGE as COMPARE
from randlora_pl.cli.help.report import PAGE as REPORT
from randlora_pl.cli.help.sweep import PAGE as SWEEP
from randlora_pl.cli.help.tune import PAGE as TUNE
from randlora_pl.config.class_index import Option, read_classes
from randlora_pl.config.validate import CALLBACK_GROUPS, RUN_OPTIONS, adapters, data_class, tasks
from randlora_pl.language.catalog import DATASETS, LABELLED

_START = {
    "fit": """\
Train, and test the last weights; VisionLanguageTask and TextHeadTask also test the untrained model before that.
Everything about the run goes to runs/NAME/TIME: config, TensorBoard, log, checkpoint, adapter, results.json.

  randlora-pl fit --config quickstart
  randlora-pl fit --config clip_vitb32 --config lora --data.dataset cifar10 --data.shots 16
  randlora-pl fit --resume runs/quickstart/TIME              goes on after a crash or Ctrl-C
""",
    "test": """\
Test an adapter on the test images of a data set, or the untrained model where no adapter is named.

  randlora-pl test --run runs/quickstart/TIME                config and adapter of a run
  randlora-pl test --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
""",
    "validate": """\
Test an adapter on the validation images, which are kept out of training.

  randlora-pl validate --run runs/quickstart/TIME            config and adapter of a run
  randlora-pl validate --adapter FOLDER --config clip_vitb32 --data.dataset cifar10
""",
    "predict": """\
Classify images or texts with a trained adapter, or answer prompts. Writes a CSV file: image, class, probability and the
next best classes; or text, class ...; or prompt, written. Several adapters share one pass over the images and, where
they can, one base model; the file then has a line for each image and adapter: image, adapter, class, probability ...

  randlora-pl predict --adapter runs/quickstart/TIME/adapter --images photos/ cat.jpg --output predictions.csv
  randlora-pl predict --adapter RUN/adapter --texts questions.txt
  randlora-pl predict --adapter runs/cars/TIME/adapter pets=pets.safetensors --images photos/
  randlora-pl predict --adapter ADAPTER ADAPTER --weights 0.5 0.5 --images photos/

  --adapter [NAME=]PATH ...  Adapter folders (RUN/adapter) or .safetensors files, which know their base model, class
                        names and prompts; the default NAME is the part in which their paths differ
  --pretrained FILE     Weights file of a base model, where this machine does not know it; again for further ones. Of a
                        language model its folder
  --weights W ...       One model instead: the base and the sum of the adapters' updates, each W times; the classes
                        must be the same. One adapter and one W scale its update
  --images PATH ...     Image files, and folders that are searched
  --texts FILE ...      .txt with a text a line (- reads such lines from standard input); .jsonl or .csv with prompt,
                        text, or text_a and text_b, where labels and completions are left out
  --output FILE         CSV file to write; - prints it (default predictions.csv)
  --overwrite           Replace the file if it exists
  --top-k K             Classes listed for each (default 5)
  --max-new-tokens N    Most tokens that are written after a prompt (default: as in the training)
  --beams N             Beams of the search for them, 1 is greedy (default: as in the training)
  --precision P         Of language models: 32 (default), or bf16, as trained with bf16-mixed, in half the memory
  --batch-size N        Images or texts at a time (default 64, prompts 16)
  --device DEVICE       cpu, cuda, mps ... (default: what there is)
  --on-error ACTION     raise, or skip an unreadable image and go on
  --max-pixels N        Largest image, width x height (default 50000000)
""",
    "compare-methods": """\
Every method on one few-shot data set over several seeds: a sweep, then a table of mean and standard error beside two
classifiers of raw pixels. The same command goes on after Ctrl-C, and only prints the table once all is done.

  randlora-pl compare-methods                                 16 shots of the digits, 3 seeds
  randlora-pl compare-methods --methods RandLoRA-6 --seeds 4 5

  --config SWEEP        The sweep to run: a shipped one or a file (default compare_methods)
  --methods NAME ...    Some of its methods
  --seeds N ...         Other seeds than the config's
  --tune                Search the learning rates on the validation images first, then run with the best
  --output DIR          The sweep's folder (default runs/sweeps/NAME); the table is DIR/table.md

and all other options of sweep, such as --jobs N and --dry-run: randlora-pl sweep --help
""",
    "zeroshot": """\
Test an untrained CLIP: prompts of the data set averaged, and the single prompt, beside the published figures.
Differences of more than a few tenths of a point hint at a wrong layout, class order or prompts.

  randlora-pl zeroshot                                        the tiny CLIP on the digits
  randlora-pl zeroshot --model.name ViT-B-32 --model.pretrained openai --data.dataset all

  --model.name NAME         An open_clip architecture (default tiny, which is shipped)
  --model.pretrained TAG    A tag of open_clip, a weights file, or random
  --data.dataset NAME       A dataset, or all: the paper's datasets that are on this machine (default digits)
  --data.root PATH          Folder that holds the data (default: the user's data folder)
  --data.eval_batch_size N  Images at a time (default 256)
  --device DEVICE           cpu, cuda, mps ... (default: what there is)
  --run.root FOLDER         zeroshot.json goes to FOLDER/zeroshot/TIME (default runs)
""",
    "data": """\
Get a data set; is it what it should be, and what does it look like?

  randlora-pl data get NAME ... | --all        download, verify, unpack, check; or print the manual steps
  randlora-pl data check NAME ... | --all      images of each split and class beside what is expected
  randlora-pl data show NAME                   a contact sheet (PNG) with class names, split counts and prompts

  --root PATH      Folder that holds the data (default: the user's data folder); for folder, table, hf, pairs your own

  get: goes on where it was interrupted; 1 is returned where a data set could not be had
  --keep           Keep the archives in PATH/downloads (default: removed once the check has passed)

  check: 0 is returned where all is as expected, 1 where something is off or missing, 2 after a wrong command
  --fast           Decode no image
  --every-image    Decode all images (default: 8 of each split)

  show:
  --output FILE    PNG file to write, a new one (default contact-sheet-NAME.png, which is replaced)
  --shots K        Training images of each class (default 4), as --data.shots K chooses them with seed 0
""",
    "bench": """\
How fast is this machine? Everything compared is timed in turns, in one run.

  randlora-pl bench data NAME          images a second of each stage of the input pipeline, beside plain torchvision
  randlora-pl bench train              whole training steps: full fine-tuning, LoRA, RandLoRA, and PEFT's if installed
  randlora-pl bench captions           steps of the vision-language task: captions encoded once, and one an image
  randlora-pl bench answers            a decoder's answers in batches, and one by one
  randlora-pl bench adapters           adapted layers against width, tokens, number of bases and depth

  data:
  --root PATH          Folder that holds the data (default: the user's data folder)
  --image-size PIXELS  Height and width of the batches' images (default 224)
  --batch-size N       Images of a batch (default 64)
  --workers N          Processes that make batches (default 2)
  --images N           Images of a round (default 1024)
  --rounds N           Times that everything is measured; the median and the extremes are shown (default 5)
  --output FILE        JSON file for the figures, a new one

  train, captions, answers, adapters; random weights, random data:
  --precision P        32, bf16 for autocast, or bf16-frozen with frozen weights in bfloat16, too (default 32);
                       answers have all weights in bfloat16 with either
  --rounds N           Times that everything is measured (default 5 for train, else 3)
  --threads N          Threads of PyTorch on a CPU (default: its own choice)
  --device DEVICE      cpu or cuda (default: cuda where there is one)
  --output FOLDER      A new folder for bench.json, table.md and, but for answers, bench.png
                       (default runs/bench-VERB/TIME)

  train:
  --model NAME         A model of timm, the image tower of one of open_clip, or a decoder such as
                       Qwen/Qwen2-0.5B-Instruct (default vit_base_patch32_224)
  --library NAME       timm or open_clip, where both know the name
  --batch-size N       Images of a step (default 64), or samples of text (default 4)
  --tokens N           Tokens of a sample of text (default 256)
  --overrides OPTIONS  What a decoder's configuration has instead, such as '{num_hidden_layers: 4}'
  --dropout P          Dropout on the input of the adapters' paths (default 0)
  --methods NAME ...   default: full lora randlora randlora-hadamard randlora-ternary peft-lora peft-randlora;
                       also: randlora-low (memory: low) dora vera nola peft-dora peft-vera
  --targets NAME ...   What adapters attach to, as --model.targets (default qkv fc1 fc2, as the paper; all: every
                       linear layer of the blocks; conv: their convolutions)
  --rss                Measure the resident set of a process for each method as well; takes as long again

  captions:
  --model NAME         A CLIP model of open_clip (default ViT-B-32)
  --batch-size N       Images of a step (default 128)
  --classes N          Captions that differ (default 10)

  answers:
  --model NAME         A decoder (default Qwen/Qwen2-0.5B-Instruct); --overrides as for train
  --batch-sizes N ...  Prompts at a time, beside 1 (default 16, or all samples where they are fewer)
  --samples N          Prompts (default 32)
  --beams N            Beams of the search (default 4, as the paper's scripts; 1 is greedy)
  --new-tokens N       Tokens of an answer (default 32)

  adapters:
  --sweeps NAME ...    width tokens rank depth (default: all)
  --widths N ...       Features; likewise --tokens, --ranks (bases are width / rank), --depths
  --methods NAME ...   As for train
""",
    "adapter": ADAPTER,
    "analyze": ANALYZE,
    "report": REPORT,
    "compare": COMPARE,
    "serve": """\
Answer requests for predictions over HTTP, with a page to drop images on (pip install 'randlora-pl[serve]').

  randlora-pl serve --adapter runs/quickstart/TIME/adapter
  curl -F image=@photo.jpg 'http://127.0.0.1:8000/predict?top_k=3'
  curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

  --adapter ADAPTER        Folder or file; it knows its base model, class names and prompts
  --pretrained FILE        Weights file of the base model, where this machine does not know it
  --host ADDRESS           127.0.0.1 for this machine alone (default), 0.0.0.0 or :: for all
  --port PORT              (default 8000)
  --token TOKEN            Answer only requests with the header Authorization: Bearer TOKEN; others see it in the list
                           of processes, but not the environment variable RANDLORA_PL_TOKEN, which does the same
  --allow-host NAME ...    Further names in requests' Host, such as a proxy's (default: this machine's)
  --device DEVICE          cpu, cuda, cuda:1, mps ... (default: what there is)
  --workers N              Processes with a model of their own (default 1); one GPU is kept busy by one
  --batch-size N           Images that are classified together at most (default 16)
  --batch-timeout SECONDS  How long to wait for a batch to fill (default 0.01); 0 takes what is there
  --max-upload-mb MB       Larger uploads are refused with 413, far larger ones before they are read (default 20)
  --max-pixels N           Larger images are refused with 413 by their header (default 50,000,000)

POST /predict gives {"classes": [{"name": "cat", "probability": 0.93}, ...]}, the probabilities of `predict`.
What cannot be answered gives a 4xx or 5xx with {"detail": "what is wrong"}. GET / is the page; GET /health
returns model, classes and limits, with 200 once requests are answered. 128 requests at a time; more give 503.
Headers must come within 10 s, uploads within 60 s. With a token, the page (which asks for it) and the status of
GET /health stay open.
Ctrl-C or SIGTERM ends it, and answers what is being asked.
""",
    "sweep": SWEEP,
    "tune": TUNE,
    "datasets": """\
List the datasets (datasets), or show some of them in full (datasets NAME ...).

  --root PATH      Folder in which to look for the data (default: the user's data folder)
""",
    "models": "List backbones with their sizes, weights and configs (models), or some (models NAME ...).\n",
    "adapters": "List the methods (adapters), or explain the options of some of them (adapters NAME ...).\n",
    "config": """\
The shipped configs.

  config list            what there is
  config cat NAME        print one
  config cp NAME [FILE]  copy one, to change it; an existing file is not overwritten
""",
    "doctor": "Show versions, devices, data, cached weights and network; print how to get what is missing.\n",
}


def page(verb: str) -> str:
    """Return the help page of a command, at most 60 lines.

    Args:
        verb: One of the application's commands.
    """
    if verb not in ("fit", "test", "validate"):
        return _START[verb]
    fit = verb == "fit"
    lines = [_START[verb], _line("--config NAME", "Shipped config or a file; repeat it to merge, the later one wins")]
    if fit:
        again = "Continue this run folder; what you type beats its config. auto: the newest run of this name, as it was"
        lines += [_line(f"--run.{name} VALUE", text) for name, text in RUN_OPTIONS.items()]
        lines += [_line("--resume RUN", f"{again}, unless it is finished or there is none")]
        lines += [_line(f"--{group}.{name}", _short(option)) for group, name, option in _callback_options()]
    lines += [
        _line("--seed_everything N", "Seed of the run: few-shot images, order, augmentation, bases (default 0)"),
        _line("--model TASK", f"{', '.join(tasks())}; its options:"),
        *_names("model", {name: option for source in tasks().values() for name, option in source.options.items()}),
        _line("--model.adapter METHOD", f"{', '.join(adapters())}"),
        _line("--model.adapter.OPTION", "See: randlora-pl adapters METHOD"),
        _line(
            "--data.dataset NAME",
            f"See: randlora-pl datasets; of texts: {', '.join(DATASETS | LABELLED)}; other options:",
        ),
        *_names("data", {name: option for task in tasks() for name, option in data_class(task).options.items()}),
        _line("--trainer.OPTION", "Lightning's, for example accelerator, devices, precision, accumulate_grad_batches"),
        "",
        f"All of them explained: randlora-pl {verb} --help-all, --model.help TASK, --model.adapter.help METHOD",
        "",
    ]
    return "\n".join(lines)


def _callback_options() -> list[tuple[str, str, Option]]:
    classes = read_classes("callbacks")
    return [
        (group, option.name, option)
        for group, name in CALLBACK_GROUPS.items()
        if name in classes
        for option in classes[name].options.values()
    ]


def _line(name: str, text: str) -> str:
    return entry(name, text, column=30)


def _short(option: Option) -> str:
    """Return the first sentence of an option's explanation, with its default if it has one."""
    sentence = re.split(r"(?<=[^.\d])[.;:] ", option.help + " ")[0].rstrip(". ")
    default = "" if option.default == "None" else f" (default {(option.default or '').strip(chr(39))})"
    return f"{sentence.replace('``', '')}{default}"


def _names(group: str, options: dict[str, Option]) -> list[str]:
    """Return the options of a group on as few lines as they need."""
    names = ", ".join(f"{name}" for name in options if name not in ("adapter", "dataset", "seed"))
    return [entry(f"  --{group}.", names, column=30)]
