"""Hook of MkDocs: pages that are made from the program while the site is built.

The pages of `PAGES` exist on the site only. A page of docs/methods/ has written text; its options, learning rates and
config are added below.
"""

import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

from randlora_pl.commands.main import COMMANDS, main, members  # noqa: E402
from randlora_pl.data.catalog import CATALOG  # noqa: E402
from randlora_pl.language.catalog import DATASETS, KNOWN, LABELLED  # noqa: E402
from randlora_pl.models.catalog import MODELS  # noqa: E402
from randlora_pl.run.options.classes import (  # noqa: E402
    Option,
    RunOptions,
    callback_classes,
    classes,
    data_class,
    options_of,
    summary,
)
from randlora_pl.utils import __version__  # noqa: E402


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table. Bars between backticks are no borders, others are escaped."""
    lines = [list(header), *(list(row) for row in rows)]
    text = ["| " + " | ".join(re.sub(r"(`[^`]*`)|\|", _escaped, str(cell)) for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]])


def _escaped(found: re.Match[str]) -> str:
    return found[1] or "\\|"


def code(value: object) -> str:
    """Return a value between backticks, or nothing."""
    return f"`{value}`" if value not in (None, "") else ""


def helped(*words: str) -> str:
    """Return what a command prints for ``--help``."""
    with redirect_stdout(io.StringIO()) as printed:
        main([*words, "--help"])
    return printed.getvalue().rstrip()


def help_pages() -> str:
    """Return the help page of every command."""
    parts = ["# Command options", "The help page of each command, as `randlora-pl COMMAND --help` prints it."]
    for words in [("",), *((verb,) for verb in COMMANDS)]:
        title = f"randlora-pl {words[0]}".strip()
        parts.append(f"## {title}\n\n```text\n{helped(*filter(None, words))}\n```")
        for verb in members(words[0]):
            parts.append(f"### {title} {verb}\n\n```text\n{helped(words[0], verb)}\n```")
    return "\n\n".join(parts)


def options(given: Iterable[Option], prefix: str) -> str:
    """Return a table of options, each named as it is typed."""
    rows = [
        (code(prefix + one.name), code(one.choices), code(one.written) or "required", one.help.replace("``", "`"))
        for one in given
    ]
    return table(("option", "type", "default", "meaning"), rows)


def config_keys() -> str:
    """Return the options of every class that a config names."""
    run = options_of(RunOptions).values()
    parts = [
        "# Config keys",
        "Write a key in a config file, or type it as an option: `--data.shots 16` is the key `shots` of `data`. "
        "The options of Lightning's trainer (`--trainer.OPTION`) are on its own pages.",
        "## run",
        table(("option", "meaning"), [(code(f"--run.{one.name}"), one.help) for one in run]),
    ]
    groups: list[tuple[str, Iterable[type]]] = [
        ("--model.", classes("model").values()),
        ("--data.", dict.fromkeys(map(data_class, classes("model").values()))),
        ("--model.adapter.", classes("model.adapter").values()),
    ]
    groups += [(f"--{group}.", [kind]) for group, kind in callback_classes().items()]
    for prefix, kinds in groups:
        for kind in kinds:
            parts += [f"## {kind.__name__}", summary(kind).replace("``", "`")]
            parts.append(options(options_of(kind).values(), prefix) if options_of(kind) else "It has no options.")
    return "\n\n".join(parts)


def datasets() -> str:
    """Return the catalogs of datasets."""
    images = [
        (
            code(row.name),
            f"[{row.title}]({row.source})" if row.source.startswith("https://") else row.title,
            row.classes or "yours",
            ", ".join(f"{split} {count:,}" for split, count in row.counts.items()) or "yours",
            row.license,
        )
        for row in CATALOG.values()
    ]
    header = ("name", "what it is", "classes", "images", "license")
    return "\n\n".join(
        [
            "# Datasets",
            "Pass a name as `--data.dataset NAME`. `randlora-pl datasets NAME` shows prompts, files and source of one, "
            "and whether it is on your machine. `randlora-pl data get NAME` downloads it.",
            f"## Images\n\n{table(header, images)}",
            "## Prompts and completions\n\nFor `--model CausalLMTask`; see [Prompts and completions](prompts.md).",
            table(("name", "what it is"), [(code(name), text) for name, text in DATASETS.items()]),
            "## Labelled texts\n\nFor `--model TextClassificationTask`; see [Labelled texts](labelled_texts.md).",
            table(("name", "what it is"), [(code(name), text) for name, text in LABELLED.items()]),
        ]
    )


def models() -> str:
    """Return the catalogs of base models."""
    images = [
        (code(row.name), row.library, f"{row.parameters / 1e6:,.1f} M", row.image_size, ", ".join(map(code, row.tags)))
        for row in MODELS
    ]
    texts = [
        (code(name), code(known.config), f"{known.parameters / 1e6:,.1f} M", known.license)
        for name, known in KNOWN.items()
    ]
    return "\n\n".join(
        [
            "# Models",
            "These base models are tested. Any other name of open_clip, timm or transformers works, too: pass "
            "`--model.name NAME` and `--model.pretrained TAG`, a weights file, or `random`.",
            f"## Images\n\n{table(('name', 'library', 'parameters', 'pixels', 'weights'), images)}",
            f"## Texts\n\n{table(('name', 'config', 'parameters', 'license'), texts)}",
        ]
    )


def from_root(name: str) -> str:
    """Return a page of the repository's top folder; links into docs/ lead to the site's pages, other files get none."""
    text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
    return re.sub(r"\[([^\]]+)\]\((?!https?://|#|[\w/]+\.md)[^)]*\)", r"\1", text)


IN_PYTHON = """\
import timm
from randlora_pl.adapters import {method}, inject

model = timm.create_model("test_vit", num_classes=10)  # or a model of yours
print(inject(model, {method}(), trained=["head"]))
"""
"""The shortest use of a method."""


def tabs(parts: dict[str, str]) -> str:
    """Return texts as tabs with these titles."""
    return "\n\n".join(f'=== "{title}"\n\n{textwrap.indent(text, "    ")}' for title, text in parts.items())


def cost(method: str, config: str) -> str:
    """Return the parameters that a config trains, as its first line has them, and the measured time of a step."""
    parts = []
    if trained := re.search(r"\((.*? parameters on .*?)\)", config.partition("\n")[0]):
        parts.append(f"Its config trains {trained[1]}.")
    rows = re.findall(r"^\| (.*?) \| [\d,]+ \| .*? \| (.*?) \|", (ROOT / "docs" / "speed.md").read_text("utf-8"), re.M)
    for label, share in rows:
        if re.fullmatch(rf"{method}-\d+", label) and share:
            parts.append(f"A training step of {label} took {share} of the time of full fine-tuning on a CPU.")
    return " ".join([*parts, "[What a step costs](../speed.md) compares the methods."])


def frame(name: str) -> str:
    """Return the options, learning rates, cost and config of a method, for the end of its page."""
    (kind,) = (each for each in classes("model.adapter").values() if each.__name__.lower() == name)
    rates = getattr(kind, "learning_rates", None)
    both, vision, _ = rates if isinstance(rates, tuple) else (None, None, None)
    config = {"fullfinetuning": "full", "linearprobe": "linear_probe", "frozen": "coop"}.get(name, name)
    (file,) = (ROOT / "configs").glob(f"*/{config}.yaml")
    text = file.read_text(encoding="utf-8")
    rate = (
        f"If you set none, {both:g} for both towers of a CLIP and {vision:g} for an image tower or DINOv2. "
        "[Rank and alpha](../rank_and_alpha.md#learning-rate) has the sources."
        if both is not None
        else "If you set none, the rate of its inner method."
    )
    return "\n\n".join(
        [
            "## Options",
            options(options_of(kind).values(), "--model.adapter.") if options_of(kind) else "It has no options.",
            f"## Learning rate\n\n{rate}",
            f"## Cost\n\n{cost(kind.__name__, text)}",
            "## Use it",
            tabs(
                {
                    "Command line": f"```sh\nrandlora-pl fit --config quickstart --config {config}\n```",
                    "Config": f"`configs/{file.parent.name}/{config}.yaml`:\n\n```yaml\n{text.rstrip()}\n```",
                    "Python": f"```python\n{IN_PYTHON.format(method=kind.__name__)}```\n\n"
                    "[Your own training loop](../python.md#your-own-training-loop) goes on from here.",
                }
            ),
        ]
    )


PAGES: dict[str, Callable[[], str]] = {
    "command_options.md": help_pages,
    "config_keys.md": config_keys,
    "datasets.md": datasets,
    "models.md": models,
    "changelog.md": lambda: from_root("CHANGELOG.md"),
    "contributing.md": lambda: from_root("CONTRIBUTING.md"),
}


SOUGHT = {
    "api/index.md": ["api"],
    "python.md": ["python"],
    "install.md": ["install", "pip", "conda", "docker", "cuda"],
    "citation.md": ["citation", "cite", "bibtex"],
    "logging.md": ["wandb", "tensorboard", "mlflow"],
    "prompts.md": ["qlora", "quantize", "llama"],
    "compared_with_peft.md": ["peft"],
    "many_devices.md": ["multi-node", "slurm", "torchrun", "cluster"],
    "first_classifier.md": ["confusion"],
    "your_own_data.md": ["few-shot"],
    "adapter_files.md": ["merge"],
    "faq.md": ["imbalanced", "transparent", "multi-label", "gguf", "vllm", "license", "checkpoint"],
    "troubleshooting.md": ["memory", "oom", "nan", "401"],
}
"""Words that readers search for, and the page that comes first."""


def on_config(config: MkDocsConfig) -> None:
    """Name the version at the foot of every page."""
    config.copyright = f"randlora-pl {__version__}, Apache-2.0"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that exist on the site only."""
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Complete the page of a method, and let results come last in a search."""
    folder, _, name = page.file.src_uri.rpartition("/")
    if page.file.src_uri in SOUGHT:
        page.meta["tags"] = SOUGHT[page.file.src_uri]
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # the tabs are enough
    if folder.startswith("results"):
        page.meta["search"] = {"boost": 0.5}
    elif folder == "api":  # otherwise the name of a function comes before the page that explains the word
        page.meta["search"] = {"boost": 0.25}
    if not folder:  # a page that only the site has cannot be linked on GitHub
        markdown = markdown.replace("`CONTRIBUTING.md`", "[`CONTRIBUTING.md`](contributing.md)")
        markdown = markdown.replace(
            "`randlora-pl COMMAND --help`", "[`randlora-pl COMMAND --help`](command_options.md)"
        )
    if folder == "methods" and name not in ("index.md", "learned_prompts.md", "published_prompts.md"):
        if name != "oft.md":  # the beginning of a word counts: this tag would come first for "of"
            page.meta["tags"] = [name.removesuffix(".md")]
        if name == "loraxs.md":  # otherwise a search for "lora" finds it first, because rare words count more
            page.meta["search"] = {"boost": 0.25}
        return f"{markdown}\n\n{frame(name.removesuffix('.md'))}\n"
    return markdown
