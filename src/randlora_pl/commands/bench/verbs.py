"""``bench``: speed of the input pipeline and of training steps on this machine."""

from randlora_pl.commands.common.dispatch import dispatch

PAGE = """\
Measure the speed of this machine. Everything compared is timed in turns, in one run.

  randlora-pl bench data NAME          images per second of each stage of the input pipeline, and of plain torchvision
  randlora-pl bench train              whole training steps: full fine-tuning, LoRA, RandLoRA, and PEFT's if installed
  randlora-pl bench captions           steps of the vision-language task: captions encoded once, and one per image
  randlora-pl bench answers            a decoder's answers in batches, and one by one
  randlora-pl bench adapters           adapted layers against width, tokens, number of bases and depth

For the options of a command, run: randlora-pl bench COMMAND --help
"""

_SHARED = """\
  --precision P        32, bf16 (autocast), or bf16-frozen (frozen weights in bfloat16, too) (default: 32)
  --rounds N           Number of measurements of everything (default: 3, for bench train 5)
  --threads N          CPU threads of PyTorch (default: its own choice)
  --device DEVICE      cpu or cuda (default: cuda if available)
  --output FOLDER      New folder for bench.json, table.md and bench.png (default: runs/bench-NAME/TIME)

The weights and the data are random.
"""

PAGES = {
    "data": """\
Measure the images per second of each stage of the input pipeline, and of plain torchvision.

  randlora-pl bench data digits

  --root PATH          Folder with the data (default: the user's data folder)
  --image-size PIXELS  Height and width of the images (default: 224)
  --batch-size N       Images per batch (default: 64)
  --workers N          Processes that load batches (default: 2)
  --images N           Images per round (default: 1024)
  --rounds N           Number of measurements, for median and extremes (default: 5)
  --output FILE        New JSON file for the results
""",
    "train": f"""\
Time whole training steps of full fine-tuning and of adapters, in turns.

  randlora-pl bench train
  randlora-pl bench train --model Qwen/Qwen2-0.5B-Instruct --methods lora randlora

  --model NAME         A model of timm, the image tower of an open_clip model, or a decoder such as
                       Qwen/Qwen2-0.5B-Instruct (default: vit_base_patch32_224)
  --library NAME       timm or open_clip, if both know the name
  --batch-size N       Images per step (default: 64), or texts (default: 4)
  --tokens N           Tokens per text (default: 256)
  --overrides OPTIONS  Changes to a decoder's configuration, such as '{{num_hidden_layers: 4}}'
  --dropout P          Dropout on the input of the adapters' paths (default: 0)
  --methods NAME ...   Also: randlora-low (memory: low) dora vera nola adalora pissa loraxs hydralora hira shira
                       kradapter oft svft pranc peft-dora peft-vera (default: full lora randlora randlora-hadamard
                       randlora-ternary peft-lora peft-randlora)
  --targets NAME ...   Layers to adapt, as in --model.targets (default: qkv fc1 fc2, as in the paper). all selects
                       every linear layer of the blocks, conv their convolutions
  --rss                Also measure the resident set of a process per method, which takes as long again
{_SHARED}""",
    "captions": f"""\
Time steps of the vision-language task: captions encoded once, and one per image.

  randlora-pl bench captions

  --model NAME         A CLIP model of open_clip (default: ViT-B-32)
  --batch-size N       Images per step (default: 128)
  --classes N          Number of different captions (default: 10)
{_SHARED}""",
    "answers": f"""\
Time a decoder's answers in batches, and one by one. It writes no bench.png, and bf16 equals bf16-frozen.

  randlora-pl bench answers

  --model NAME         A decoder (default: Qwen/Qwen2-0.5B-Instruct)
  --overrides OPTIONS  What its configuration has instead, such as '{{num_hidden_layers: 4}}'
  --batch-sizes N ...  Prompts per batch, besides 1 (default: 16, or all samples if there are fewer)
  --samples N          Number of prompts (default: 32)
  --beams N            Beams of the search, 1 is greedy (default: 4, as in the paper's scripts)
  --new-tokens N       Tokens per answer (default: 32)
{_SHARED}""",
    "adapters": f"""\
Time adapted layers against width, tokens, number of bases, depth and sparsity of the bases.

  randlora-pl bench adapters
  randlora-pl bench adapters --basis ternary --sparsity 6 28 sqrt 100

  --sweeps NAME ...    width tokens rank depth sparsity (default: all but sparsity)
  --widths N ...       Features
  --tokens N ...       Tokens per batch
  --ranks N ...        Ranks. The number of bases is width / rank
  --depths N ...       Numbers of layers
  --basis NAME         Only RandLoRA with these bases, beside full fine-tuning: uniform hadamard ternary. ternary
                       sweeps the sparsity, and shows additions beside dense products
  --sparsity S ...     Sparsities of ternary bases: +1 and -1 have probability 1/S each. sqrt is the square root of D
  --methods NAME ...   See: randlora-pl bench train --help. Also: randlora-ternary-dense
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
    """Run ``bench data | train | captions | answers | adapters``."""
    return dispatch("bench", VERBS, PAGE, args, pages=PAGES)
