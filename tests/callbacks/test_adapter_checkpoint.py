"""Checkpoints of a user's own LightningModule: their size, what they refuse, and the bits of resumed runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from randlora_pl.adapters import PiSSA, inject, merge, merge_and_unload
from randlora_pl.adapters.checkpoints import leave_out_frozen
from randlora_pl.callbacks import AdapterCheckpoint
from randlora_pl.utils.errors import UserError
from tests.run.parallel.jobs import environment, free_port

from .own_module import METHODS, OwnModule, encoder, loader, trainer, weights

ROOT = Path(__file__).parents[2]


def encoder_names(state: dict[str, Tensor]) -> set[str]:
    return {name.removeprefix("model.") for name in state if name.startswith("model.")}


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("method", "averages"), [("randlora", True), ("adalora", False)])
def test_a_checkpoint_has_all_but_the_frozen_part_and_resumes_to_the_same_bits(
    method: str, averages: bool, tmp_path: Path
) -> None:
    def mean() -> list[EMAWeightAveraging]:
        return [EMAWeightAveraging(decay=0.5)] if averages else []

    trainer(tmp_path / "first", *mean()).fit(first := OwnModule(method), loader())
    file = tmp_path / "first" / "epoch=0.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    frozen = {"model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias", "model.3.weight", "model.3.bias"}
    whole = OwnModule(method).state_dict()
    assert whole.keys() - state.keys() == frozen and first.model.state_dict().keys() == encoder_names(whole)
    assert state.keys() - whole.keys() == {"model.adapter_report"}
    assert file.stat().st_size < 0.7 * sum(whole[name].nbytes for name in frozen)

    again = trainer(tmp_path / "again", *mean())
    again.fit(resumed := OwnModule(method), loader(), ckpt_path=file)
    assert same(first, resumed)
    again.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    loaded = OwnModule.load_from_checkpoint(tmp_path / "end.ckpt")
    assert same(loaded, resumed)
    merge(other := OwnModule(method).model)
    other.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
    assert torch.equal(other[0].weight, encoder()[0].weight)  # unmerged
    (figures,) = trainer(tmp_path).test(OwnModule(method), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert figures == trainer(tmp_path).test(resumed, loader(), verbose=False)[0]


def test_other_bases_and_adapters_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path, epochs=1).fit(OwnModule(), loader())
    file = tmp_path / "epoch=0.ckpt"
    with pytest.raises(UserError, match="different base weights"):
        OwnModule.load_from_checkpoint(file, seed=1)
    with pytest.raises(UserError, match="different base weights"):
        trainer(tmp_path).fit(OwnModule(seed=1), loader(), ckpt_path=file)
    with pytest.MonkeyPatch.context() as patched:
        for option in ({"seed": 3}, {"rank": 2}, {"alpha": 7.0}):
            patched.setitem(METHODS, "other", METHODS["randlora"].replace(**option))
            with pytest.raises(UserError, match="different options of the adapter"):
                OwnModule.load_from_checkpoint(file, method="other")
    state = torch.load(file, weights_only=True)["state_dict"]
    del state["model.0.delta.lambdas"]
    with pytest.raises(RuntimeError, match=r"Missing key.* \"model.0.delta.lambdas\""):
        OwnModule().load_state_dict(state)


def test_derived_tensors_stay() -> None:
    inject(model := encoder(), PiSSA(rank=2))
    leave_out_frozen(model, state := model.state_dict())
    assert "3.delta.U" in state or any(
        ".delta." in name and name not in dict(model.named_parameters()) for name in state
    )
    inject(fresh := encoder(), PiSSA(rank=2))
    assert fresh.load_state_dict(state).missing_keys == []


def test_a_merged_model_trains_unmerged(tmp_path: Path) -> None:
    plain, merged = OwnModule(), OwnModule()
    merged.head.load_state_dict(plain.head.state_dict())
    merge(merged.model)
    for module in (plain, merged):
        trainer(tmp_path, epochs=1).fit(module, loader())
    assert same(merged, plain)


def test_mistakes_end_before_the_training(tmp_path: Path) -> None:
    def refused(module: OwnModule, message: str, attribute: str = "model") -> None:
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, callbacks=[AdapterCheckpoint(attribute)], enable_checkpointing=False).fit(
                module, loader()
            )

    refused(OwnModule(), r"OwnModule has no module 'modle'. Did you mean 'model'", "modle")
    refused(OwnModule(), "head of OwnModule: the model has no adapter", "head")
    plain = OwnModule()
    merge_and_unload(plain.model)
    refused(plain, "the model has no adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 sharded"])
def test_two_processes_resume_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}", "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, "-m", "tests.callbacks.own_module", str(tmp_path), kind]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(tmp_path, **common, RANK=rank, LOCAL_RANK=rank), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]  # fmt: skip
    for process in processes:
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in "01"]
    differ = [
        {name for name, end in rank["first"].items() if not torch.equal(end, rank["again"][name])} for rank in ranks
    ]
    # Only DDP exchanges running statistics. A checkpoint of FSDP2 has those of one rank.
    assert differ[0] | differ[1] <= (set() if kind == "ddp" else {"model.1.running_mean", "model.1.running_var"})
    one_file = kind == "fsdp2"  # the strategy loads whole states only, so the base model is in the file
    assert set() in differ and all(("different base weights" in rank["refused"]) != one_file for rank in ranks)
    saved = tmp_path / "first" / "epoch=0.ckpt"
    sharded = saved.is_dir()
    names = FileSystemReader(saved).read_metadata().state_dict_metadata if sharded else torch.load(saved)["state_dict"]
    held = {name.removeprefix("state_dict.") for name in names}
    assert "model.0.delta.lambdas" in held
    assert len(held & {f"model.{name}" for name, _ in encoder().named_parameters()}) == 6 * one_file
