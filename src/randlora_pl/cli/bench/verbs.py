"""``bench``: speed of the input pipeline and of training steps on this machine."""

from randlora_pl.cli.common.dispatch import dispatch

PAGE = """\
How fast is this machine? Everything compared is timed in turns, in one run.

  randlora-pl bench data NAME          images per second of each stage of the input pipeline, beside plain torchvision
  randlora-pl bench train              whole training steps: full fine-tuning, LoRA, RandLoRA, and PEFT's if installed
  randlora-pl bench captions           steps of the vision-language task: captions encoded once, and one per image
  randlora-pl bench answers            a decoder's answers in batches, and one by one
  randlora-pl bench adapters           adapted layers against width, tokens, number of bases and depth

Each explained: randlora-pl bench VERB --help
"""

_SHARED = """\
  --precision P        32, bf16 for autocast, or bf16-frozen with frozen weights in bfloat16, too (default 32)
  --rounds N           Number of times that everything is measured (default 3, of bench train 5)
  --threads N          Threads of PyTorch on a CPU (default: its own choice)
  --device DEVICE      cpu or cuda (default: cuda where there is one)
  --output FOLDER      A new folder for bench.json, table.md and bench.png (default runs/bench-NAME/TIME)

The weights and the data are random.
"""

PAGES = {
    "data": """\
Images per second of each stage of the input pipeline, beside plain torchvision.

  randlora-pl bench data digits

  --root PATH          Folder that holds the data (default: the user's data folder)
  --image-size PIXELS  Height and width of the batches' images (default 224)
  --batch-size N       Images per batch (default 64)
  --workers N          Processes that make batches (default 2)
  --images N           Images per round (default 1024)
  --rounds N           Number of times that everything is measured, for median and extremes (default 5)
  --output FILE        JSON file for the results, a new one
""",
    "train": f"""\
Time whole training steps of full fine-tuning and of adapters, in turns.

  randlora-pl bench train
  randlora-pl bench train --model Qwen/Qwen2-0.5B-Instruct --methods lora randlora

  --model NAME         A model of timm, the image tower of one of open_clip, or a decoder such as
                       Qwen/Qwen2-0.5B-Instruct (default vit_base_patch32_224)
  --library NAME       timm or open_clip, where both know the name
  --batch-size N       Images per step (default 64), or samples of text (default 4)
  --tokens N           Tokens of a sample of text (default 256)
  --overrides OPTIONS  What a decoder's configuration has instead, such as '{{num_hidden_layers: 4}}'
  --dropout P          Dropout on the input of the adapters' paths (default 0)
  --methods NAME ...   default: full lora randlora randlora-hadamard randlora-ternary peft-lora peft-randlora;
                       also: randlora-low (memory: low) dora vera nola peft-dora peft-vera
  --targets NAME ...   What adapters attach to, as --model.targets (default qkv fc1 fc2, as the paper; all: every
                       linear layer of the blocks; conv: their convolutions)
  --rss                Measure the resident set of a process for each method as well; takes as long again
{_SHARED}""",
    "captions": f"""\
Time steps of the vision-language task: captions encoded once, and one per image.

  randlora-pl bench captions

  --model NAME         A CLIP model of open_clip (default ViT-B-32)
  --batch-size N       Images per step (default 128)
  --classes N          Number of different captions (default 10)
{_SHARED}""",
    "answers": f"""\
Time a decoder's answers in batches, and one by one. It writes no bench.png; bf16 and bf16-frozen are the same here.

  randlora-pl bench answers

  --model NAME         A decoder (default Qwen/Qwen2-0.5B-Instruct)
  --overrides OPTIONS  What its configuration has instead, such as '{{num_hidden_layers: 4}}'
  --batch-sizes N ...  Prompts at a time, beside 1 (default 16, or all samples where they are fewer)
  --samples N          Prompts (default 32)
  --beams N            Beams of the search (default 4, as the paper's scripts; 1 is greedy)
  --new-tokens N       Tokens of an answer (default 32)
{_SHARED}""",
    "adapters": f"""\
Time adapted layers against width, tokens, number of bases and depth.

  randlora-pl bench adapters

  --sweeps NAME ...    width tokens rank depth (default: all)
  --widths N ...       Features
  --tokens N ...       Tokens of a batch
  --ranks N ...        Ranks; the number of bases is width / rank
  --depths N ...       Numbers of layers
  --methods NAME ...   See: randlora-pl bench train --help
{_SHARED}""",
}

VERBS = {
    "data": "bench.data:data_verb",
    "train": "bench.steps:train_verb",
    "captions": "bench.steps:captions_verb",
    "answers": "bench.answers:answers_verb",
    "adapters": "bench.sweeps:adapters_verb",
}


def bench_verb(args: list[str]) -> int:
    """Run ``bench data | train | adapters | captions | answers``."""
    return dispatch("bench", VERBS, PAGE, args, pages=PAGES)
