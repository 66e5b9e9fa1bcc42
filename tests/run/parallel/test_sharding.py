"""Two ranks with sharded blocks train, evaluate and resume as one process without, on CPUs with gloo."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from randlora_pl.adapters import SVFT, GaLore, LoRA, RandLoRA, inject, load_adapter
from randlora_pl.data import ImageData
from randlora_pl.run.parallel.strategy import AdapterFSDP, shard, with_strategy
from randlora_pl.tasks import AdaptationModule, PromptTask
from randlora_pl.utils.errors import UserError
from tests.support.cli import SMALL, Run
from tests.tasks.small import make, trained, two_blocks

from .jobs import environment, free_port
from .sharding_worker import ACCUMULATE, DATA, RUNS, main, trainer

ROOT = Path(__file__).parents[3]
SAMPLES = 143
"""Images in the validation split of the digits."""
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process (this one) and two ranks left what they ended with."""
    folder = tmp_path_factory.mktemp("sharding")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}", "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, "-m", "tests.run.parallel.sharding_worker", str(folder)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(folder, **common, RANK=rank, LOCAL_RANK=rank), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        with two_blocks():
            main(folder)
    finally:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What each process ended with, by ``WORLD-RANK``."""
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def test_one_rank_with_sharded_blocks_trains_to_the_bits_of_a_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeness of the slow tests: all shards are here, and gathered as on several ranks."""
    monkeypatch.setattr("randlora_pl.run.parallel.launch._meetings", [])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}", "WORLD_SIZE": "1", "NODE_RANK": "0"}
    for name, value in (place | {"LOCAL_RANK": "0"}).items():  # Lightning sets them, too
        monkeypatch.setenv(name, value)
    weights, strategy = [], AdapterFSDP()
    for chosen in ("auto", strategy):
        task = make("linear head", adapter=LoRA(rank=2))
        with two_blocks():
            trainer(accumulate=1, strategy=chosen, max_steps=2).fit(AdaptationModule(task), ImageData(**DATA))
        weights.append(trained(task))
    torch.distributed.destroy_process_group()
    shards = strategy.shards
    assert shards is not None and shards.blocks == 2 and shards.bytes == shards.device_bytes > 0
    assert str(shards).startswith("frozen weights of 2 blocks: ")
    assert strategy.metrics()["sharded/bytes"] == shards.bytes
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sharded_ranks_train_to_the_weights_of_one_process(name: str, results: Results) -> None:
    """Four steps of SGD with two micro-batches each; a method, a task and gradient checkpointing a run."""
    alone, first, second = (results[key][name] for key in ("1-0", "2-0", "2-1"))
    assert [result["steps"] for result in (alone, first, second)] == [4, 4, 4]
    kind, adapter, options = RUNS[name]
    start = make(kind, adapter=adapter, **options)
    start.set_classes(list("0123456789"), ["{}"])
    with two_blocks():
        start.adapt()
    before, moved, wrong = trained(start), 0.0, 0.0
    assert alone["weights"].keys() == first["weights"].keys() == before.keys()
    for tensor, value in alone["weights"].items():
        assert torch.equal(first["weights"][tensor], second["weights"][tensor]), tensor
        torch.testing.assert_close(first["weights"][tensor], value, rtol=0, atol=1e-6)
        moved += float((value - before[tensor]).norm() ** 2)
        wrong += float((value - first["weights"][tensor]).norm() ** 2)
    assert wrong**0.5 < 1e-4 * moved**0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_each_rank_holds_half_of_the_blocks_and_reduces_what_trains(name: str, results: Results) -> None:
    ranks = [results[key][name] for key in ("2-0", "2-1")]
    towers = 2 if RUNS[name][0] == "vision-language" else 1
    inside = {n: v for n, v in results["1-0"][name]["frozen"].items() if ".resblocks." in n}
    whole = 4 * sum(value.numel() for value in inside.values())
    size = 4 * sum(value.numel() for value in ranks[0]["weights"].values())
    for rank in ranks:
        assert rank["sharded"] == rank["sharded at the end"] == (whole, whole // 2)
        assert rank["shards"] == {"blocks": 2 * towers, "bytes": whole, "device_bytes": whole // 2}
        assert (rank["exchange/bytes_per_step"], rank["exchange/messages_per_step"]) == (size, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "hadamard", "bitfit"])
def test_blocks_are_gathered_for_each_pass_that_needs_them(name: str, results: Results) -> None:
    """The image tower twice a micro-batch, the text tower, whose features a step shares, twice a step."""
    frozen = {n: 4 * value.numel() for n, value in results["1-0"][name]["frozen"].items() if ".resblocks." in n}
    text = sum(size for n, size in frozen.items() if ".visual." not in n)
    expected = 4 * 2 * (ACCUMULATE * (sum(frozen.values()) - text) + text)
    surplus = results["2-0"][name]["gathered"] - expected
    assert 0 <= surplus <= 5 * max(text, sum(frozen.values()) - text) / 2  # one block ahead in vain a step


@pytest.mark.slow
def test_no_weight_waits_whole_for_the_backward_pass(results: Results) -> None:
    """Even if ``memory`` is ``fast``, which one process honours."""
    assert RUNS["dense"][1].options()["memory"] == "fast"
    assert results["2-0"]["dense"]["kept"] == results["2-0"]["hadamard"]["kept"] == 0 < results["1-0"]["dense"]["kept"]


@pytest.mark.slow
def test_matrices_are_gathered_in_half_of_the_bytes_where_products_are_in_bfloat16(results: Results) -> None:
    """Trained tensors stay float32, and end where frozen weights in bfloat16 lead one process."""
    alone, first, second = (results[key]["half"] for key in ("1-0", "2-0", "2-1"))
    assert first["kinds"] == {torch.float32} != alone["kinds"]  # the shards
    once = 2 * first["matrices"]
    surplus = first["gathered"] - 4 * 2 * ACCUMULATE * once
    assert 0 <= surplus <= 5 * once / 2
    start = make("linear head", adapter=RandLoRA(rank=8))
    start.set_classes(list("0123456789"), ["{}"])
    with two_blocks():
        start.adapt()
    for tensor, before in trained(start).items():
        value = first["weights"][tensor]
        assert value.dtype == torch.float32 and torch.equal(value, second["weights"][tensor])
        moved = alone["weights"][tensor] - before
        assert (value - alone["weights"][tensor]).norm() <= 0.1 * moved.norm(), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sharded_ranks_evaluate_as_one_process(name: str, results: Results) -> None:
    """On merged weights, before, within and after the training; every weight is back afterwards, bit for bit."""
    alone, first, second = (results[key][name] for key in ("1-0", "2-0", "2-1"))
    assert first["figures"] == second["figures"] == pytest.approx(alone["figures"], rel=1e-5)
    assert ("val/loss in the training" in alone["figures"]) == (name == "dense")
    assert sorted(first["seen"] + second["seen"]) == list(range(SAMPLES))
    assert alone["restored"] and first["restored"] and second["restored"]
    assert all(torch.equal(value, first["frozen"][key]) for key, value in alone["frozen"].items())


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_refused_by_all(results: Results) -> None:
    said = [results[key]["spoilt"] for key in ("1-0", "2-0", "2-1")]
    assert said[0] == said[1] == said[2] and said[0]["restored"] and "is not finite" in said[0]["said"]


def test_methods_that_train_everything_are_refused_before_anything_is_sharded() -> None:
    inject(model := nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)]), GaLore(rank=2))
    with pytest.raises(UserError, match="all of its weights train"):
        shard(model, None)


@pytest.mark.slow
def test_a_sharded_run_resumes_with_the_same_bits_and_serves_a_process_alone(folder: Path, results: Results) -> None:
    assert all(result["resumed"]["same"] for result in results.values())
    task, data = make("vision-language", adapter=RandLoRA(rank=16, dropout=0.2)), ImageData(**DATA)
    with two_blocks():
        trainer(limit_val_batches=1).validate(AdaptationModule(task), data, verbose=False)
    load_adapter(task.model, folder / "adapter-2")
    (figures,) = trainer(limit_val_batches=1.0).validate(AdaptationModule(task), data, verbose=False)
    assert figures == pytest.approx(results["2-0"]["resumed"]["figures"], rel=1e-5)


# Command line


@pytest.mark.slow
@pytest.mark.usefixtures("deep")  # as in processes of their own
def test_a_fit_with_two_devices_and_its_test_with_one(run: Run, tmp_path: Path) -> None:
    words = [*SMALL, "--data.batch_size", "4", "--trainer.limit_test_batches", "1.0", "--run.logger", "none"]
    command = [sys.executable, "-m", "randlora_pl", "fit", *words]
    done = subprocess.run(
        [*command, "--trainer.devices", "2", "--trainer.strategy", "fsdp2"], cwd=tmp_path, env=environment(tmp_path),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("frozen weights of 10 blocks: 6.9 MB of 13.8 MB on each device", "memory low"):
        assert text in done.stdout
    (file,) = tmp_path.glob("runs/*/2*/results.json")
    found = json.loads(file.read_text())
    assert found["finished"] and found["exchange/bytes_per_step"] == 4 * found["trainable_parameters"]
    assert found["sharded/device_bytes"] * 2 == found["sharded/bytes"] and found["sharded/blocks"] == 10
    alone = run("test", "--run", str(file.parent), "--trainer.devices", "1")
    assert alone.code == 0 and "nothing" in alone.err
    (tested,) = tmp_path.glob("runs/*-test/2*/results.json")
    assert json.loads(tested.read_text())["test/loss"] == pytest.approx(found["test/loss"], rel=1e-5)


# Options


def test_the_name_selects_the_strategy_with_the_timeout() -> None:
    config = with_strategy({"accelerator": "cpu", "devices": 2, "strategy": "fsdp2"}, timeout=42)
    assert type(config["strategy"]) is AdapterFSDP
    assert config["strategy"]._timeout.total_seconds() == 42


def test_one_device_shards_nothing_and_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("randlora_pl"), "propagate", True)
    assert with_strategy({"accelerator": "cpu", "devices": 1, "strategy": "fsdp2"}, timeout=9)["strategy"] == "auto"
    assert "one device, so nothing is sharded" in caplog.text


@pytest.mark.parametrize("named", ["fsdp", "fsdp_cpu_offload", "FSDP2", FSDPStrategy()])
def test_another_fsdp_is_refused(named: Any) -> None:
    with pytest.raises(UserError, match=r"--trainer\.strategy"):
        with_strategy({"accelerator": "cpu", "devices": 2, "strategy": named}, timeout=9)


def test_models_without_blocks_and_an_older_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="repeated"):
        shard(torch.nn.Linear(2, 2), None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, mesh: module)
    with pytest.raises(UserError, match=r"2\.7"):
        shard(torch.nn.Linear(2, 2), None)


def test_compiled_blocks_and_factors_of_full_size_are_not_sharded() -> None:
    strategy = AdapterFSDP()
    strategy._lightning_module = AdaptationModule(PromptTask())
    with pytest.raises(UserError, match=r"fsdp2 does not fit PromptTask.* Remove the option for ddp"):
        strategy.model_to_device()
    own = {"runs_blocks": False, "quantize": None, "torch_compile": False}
    for options, said in (
        ({"torch_compile": True}, "cannot be combined"),
        ({"quantize": "int8"}, "no quantized weights"),
    ):
        strategy._lightning_module = AdaptationModule(SimpleNamespace(**own | options))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=said):
            strategy.model_to_device()
    strategy._lightning_module = AdaptationModule(SimpleNamespace(**own, adapter=SVFT()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"SVFT holds singular vectors .*strategy ddp"):
        strategy.model_to_device()
