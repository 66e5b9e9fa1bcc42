"""The LoRA that a training starts from (``--from-adapter``): its base model, layers and data are the defaults."""

import copy
import hashlib
from pathlib import Path
from typing import Any

from randlora_pl.run.options.adapter_config import adapter_config, config_beside, data_beside
from randlora_pl.run.options.classes import class_name, method_with
from randlora_pl.run.options.compose import DEFAULTS, Command, Tree, compose, merge, normalize
from randlora_pl.run.parallel.launch import decide_first
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import find_adapter

_OWN = ("adapter", "learning_rate", "head_learning_rate")
"""Arguments of the LoRA's task that belong to its own training."""
_ENVIRONMENT = "RANDLORA_PL_FROM_ADAPTER"
"""Environment variable by which the processes that Lightning starts for further devices get the LoRA."""


def has_config(args: list[str]) -> bool:
    """Return True if a config was typed."""
    return bool({"-c", "--config"} & {word.partition("=")[0] for word in args})


def find_lora(start: str) -> Path:
    """Return the LoRA that rank 0 finds: when the others look, the newest run of a name may be the new one itself.

    Raises:
        UserError: See `find_adapter`.
    """

    def find() -> str:
        found = find_adapter(start)
        return str(found.resolve() if found.exists() else found)  # a missing one is named as it was typed

    return Path(decide_first("--from-adapter", _ENVIRONMENT, find))


def compose_fit(words: list[str], defaults: Tree | None = None) -> Command:
    """Return the command of ``fit``; with a LoRA to start from, its options are defaults.

    Args:
        words: The words behind ``fit``; a config among them decides about the data.
        defaults: Config that the first config file is merged into.

    Raises:
        UserError: See `compose`; the LoRA is missing, is another method, or is of another model.
    """
    defaults = copy.deepcopy(DEFAULTS) if defaults is None else defaults
    command = compose("fit", words, defaults)
    start = command.flat().get("from_adapter")
    if start is None:
        return command
    adapter = find_lora(str(start))
    saved = normalize(adapter_config(adapter))
    _check(adapter, saved, compose("fit", words, {}))
    task = saved["model"]
    options = {name: value for name, value in task["init_args"].items() if name not in _OWN}
    known = saved | {"model": task | {"init_args": options}}
    if not has_config(words) and (beside := config_beside(adapter)) is not None:
        known = merge(known, normalize(data_beside(beside)))
    return compose("fit", words, merge(defaults, known))


def _check(adapter: Path, saved: Tree, command: Command) -> None:
    """Refuse another method than LoRA, learned prompts, and a task or a base model that does not fit the LoRA."""
    options, flat = saved["model"]["init_args"], command.flat()
    method, task = options["adapter"]["class_path"], saved["model"]["class_path"]
    starts = method == method_with("starts_stage", True)
    if not starts or task == "PromptTask":
        found = "LoRA with learned prompts" if starts else method
        raise UserError(
            f"{adapter} is {found}, and a stage starts from LoRA alone. Train one first: randlora-pl fit "
            "--config CONFIG --model.adapter LoRA"
        )
    other = class_name("model", flat.get("model", task)) or task
    if other != task:  # its head would not be the LoRA's
        train = f", or train a LoRA of it first: randlora-pl fit --config CONFIG --model {other} --model.adapter LoRA"
        raise UserError(
            f"{adapter} is a LoRA of {task}, not of {other}. Remove --model or the config that sets it"
            + ("." if other == "PromptTask" else train)  # a LoRA beside prompts is refused, too
        )
    if (name := flat.get("model.name", options.get("name"))) != options.get("name"):
        raise UserError(
            f"{adapter} is a LoRA of {options.get('name')}, not of {name}. Remove --model.name, or train a LoRA of it "
            f"first: randlora-pl fit --config CONFIG --model.name {name} --model.adapter LoRA"
        )


def start_facts(config: Any) -> dict[str, str]:
    """Return path, checksum and place of the LoRA that a run starts from, for ``results.json``."""
    if config.from_adapter is None:
        return {}
    path = Path(config.from_adapter)
    return {"from/adapter": str(path), "from/form": config.from_form, "from/sha256": checksum_of(path)}


def checksum_of(adapter: Path) -> str:
    """Return the SHA-256 of the tensors of an adapter, from its folder or file."""
    file = adapter if adapter.is_file() else adapter / "adapter.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_start(config: Any, before: dict[str, Any]) -> None:
    """Refuse a LoRA that has changed since a run began which has no checkpoint yet.

    Args:
        config: The resolved config of the run.
        before: Its results so far.
    """
    there = before.get("from/sha256")
    if there is not None and start_facts(config).get("from/sha256", there) != there:
        raise UserError(
            f"{config.from_adapter} has changed since this run began, which has no checkpoint yet. Start a new run: "
            f"randlora-pl fit --from-adapter {config.from_adapter}"
        )
