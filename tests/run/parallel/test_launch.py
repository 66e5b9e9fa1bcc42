"""What a process learns from its environment, and what the processes of a job agree on."""

import io
import os
import subprocess
import sys

import pytest
from torch.distributed import HashStore

from randlora_pl.run.parallel.launch import Launch, broadcast_decision, decide_first, launched, meeting_of, process_rank
from randlora_pl.run.parallel.strategy import AdapterDDP, with_devices, with_strategy
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

from .jobs import free_port

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1", "RANK": "3", "LOCAL_RANK": "1",
    "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
}  # fmt: skip
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4",
}  # fmt: skip


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in {*TORCHRUN, *SLURM}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_typed_command_belongs_to_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {})
    assert launched() is None and process_rank() == 0
    assert broadcast_decision("folder", lambda: "here") == "here"


def test_a_further_process_of_lightning_is_told_by_a_variable_and_one_of_a_launcher_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launcher may have inherited the variable from an older run."""
    monkeypatch.setenv("DECISION", "older")
    monkeypatch.setattr("randlora_pl.run.parallel.launch.broadcast_decision", lambda what, decide: f"{what} of rank 0")
    use(monkeypatch, {"LOCAL_RANK": "1"})
    assert decide_first("folder", "DECISION", str) == "older"
    use(monkeypatch, {"LOCAL_RANK": "0"})
    assert decide_first("folder", "DECISION", str) == "folder of rank 0"
    use(monkeypatch, TORCHRUN)
    assert decide_first("folder", "DECISION", str) == "folder of rank 0"


@in_one_item(
    ("environment", "expected"),
    [
        (TORCHRUN, Launch(rank=3, world=4, nodes=2, per_node=2, attempt=1)),
        (SLURM, Launch(rank=5, world=8, nodes=2, per_node=4)),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, None),  # a batch script
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, None),  # a shell
    ],
)
def test_torchrun_and_steps_of_slurm_say_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Launch | None
) -> None:
    use(monkeypatch, environment)
    assert launched() == expected and (expected is None or process_rank() == expected.rank)


def test_machines_with_different_numbers_of_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SLURM | {"SLURM_NTASKS": "7"})
    with pytest.raises(UserError, match="processes"):
        launched()


def test_devices_follow_the_job_unless_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"devices": "auto", "num_nodes": 1}
    use(monkeypatch, {})
    assert with_devices(plain) == plain
    use(monkeypatch, TORCHRUN)
    assert with_devices(plain) == {"devices": 2, "num_nodes": 2}
    assert with_devices({"devices": "2", "num_nodes": 2}) == {"devices": "2", "num_nodes": 2}
    assert with_devices({"devices": [0, 1], "num_nodes": 2}) == {"devices": [0, 1], "num_nodes": 2}
    with pytest.raises(UserError, match="processes"):
        with_devices({"devices": 1, "num_nodes": 2})


def test_a_gpu_that_is_not_there_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for asked in ("gpu", "cuda"):
        message = rf"accelerator is {asked}, but PyTorch finds no GPU\. .*randlora-pl doctor"
        with pytest.raises(UserError, match=message):
            with_devices({"accelerator": asked})
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert with_devices({"accelerator": "gpu"}) == {"accelerator": "gpu"}


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"devices": 2}, True),
        ({"devices": 2, "strategy": "auto"}, True),
        ({"devices": 1}, False),
        ({"devices": 2, "strategy": "ddp_find_unused_parameters_true"}, False),
    ],
)
def test_the_strategy_is_ours_where_there_are_several_and_none_was_named(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], own: bool
) -> None:
    use(monkeypatch, {})
    strategy = with_strategy({"accelerator": "cpu"} | options, timeout=42).get("strategy")
    if own:
        assert isinstance(strategy, AdapterDDP) and strategy._timeout.total_seconds() == 42
    else:
        assert strategy == options.get("strategy")


def test_two_steps_of_a_slurm_job_do_not_meet_and_two_agents_in_steps_of_their_own_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = HashStore()
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: store)
    for more, met in (({}, False), (TORCHRUN, True)):
        found = []
        for step in "01":
            address = {"MASTER_ADDR": "here", "MASTER_PORT": "1", "SLURM_JOB_ID": "7"}
            use(monkeypatch, SLURM | {"SLURM_PROCID": "0"} | more | address | {"SLURM_STEP_ID": step, "RANK": "0"})
            monkeypatch.setattr("randlora_pl.run.parallel.launch._meetings", [])
            monkeypatch.setattr("socket.create_connection", lambda *_: io.BytesIO())
            job = launched()
            assert job is not None
            found.append(meeting_of(job).store)
        found[0].set(str(more), "")
        assert found[1].check([str(more)]) == met


ASK = """
import sys
from randlora_pl.utils.errors import UserError
from randlora_pl.run.parallel.launch import broadcast_decision, launched, meeting_of, parting, process_rank

def decide():
    if sys.argv[1] == "refuse":
        raise UserError("no")
    return f"decided by {process_rank()}"

@parting()
def ask():
    print(broadcast_decision("a", decide), "|", broadcast_decision("b", decide), end=" | ")
    print(broadcast_decision("a", lambda: f"again by {process_rank()}"))
    store = meeting_of(launched()).store
    store.set("done", "") if process_rank() else store.wait(["done"])

try:
    ask()
except UserError as error:
    print("refused", error)
"""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("give", ["decided by 0 | decided by 0 | again by 0"] * 2),
        pytest.param("refuse", ["refused no", "refused process 0 has ended: no"], marks=pytest.mark.full),
    ],
)
def test_the_first_process_decides_and_the_others_are_told(answer: str, said: list[str]) -> None:
    """As srun starts them: the first process keeps the store."""
    job = SLURM | {
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{free_port()}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, answer], env=os.environ | job | {"SLURM_PROCID": rank},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == said
