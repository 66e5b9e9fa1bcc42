"""The search of the site, by its own code in Node, finds the section that answers what readers type."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

ANSWERS = {
    "imbalanced": "faq.html#my-classes-are-imbalanced-class-weights",
    "transparent": "faq.html#my-images-are-transparent-png-webp",
    "out of memory": "troubleshooting.html#out-of-memory",
    "multi-label": "faq.html#an-image-shows-several-things-multi-label",
    "gguf": "faq.html#gguf-llamacpp-and-vllm",
    "vllm": "deploy.html#vllm",
    "early stopping": "commands.html#validation-and-early-stopping",
    "confusion": "first_classifier.html#look-at-the-mistakes-confusion-matrix",
    "few-shot": "your_own_data.html#few-images-few-shot",
    "checkpoint": "faq.html#early-stopping-and-which-checkpoint-is-tested",
    "merge": "adapter_files.html#merged-weights-for-open_clip-and-timm",
    "resume": "troubleshooting.html#it-was-killed-resume-a-run",
    "learning rate": "choose.html#the-learning-rate",
    "cluster": "many_devices.html#several-machines-multi-node-slurm-cluster",
    "slurm": "many_devices.html#several-machines-multi-node-slurm-cluster",
    "onnx": "adapter_files.html#onnx",
    "qlora": "prompts.html#save-memory-qlora-bfloat16-checkpointing",
    "lora": "methods/lora.html",
    "packed attention": "packed_attention.html",
    "detection": "faq.html#detection-segmentation-regression",
    "segmentation": "faq.html#detection-segmentation-regression",
    "regression": "faq.html#detection-segmentation-regression",
    "class weights": "faq.html#my-classes-are-imbalanced-class-weights",
    "mixed precision": "speed.html#precision",
    "license": "faq.html#is-this-the-authors-code-and-which-license-does-it-have",
    "open_clip training script": "python.html#from-an-open_clip-training-script",
}
"""What readers type, and the section that must be among the two best of the first two pages."""


def test_a_search_finds_the_section_that_answers(site: Path) -> None:
    if not (node := shutil.which("node")):
        pytest.skip("needs Node.js")
    command = [node, str(ROOT / "tests" / "docs" / "search.js"), str(site), *ANSWERS]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    best = {word: [section for page in pages[:2] for section in page[:2]] for word, pages in found.items()}
    assert not {word: best[word] for word, section in ANSWERS.items() if section not in best[word]}
