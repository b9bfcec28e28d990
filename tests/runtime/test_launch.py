"""What an environment says of several processes, and what of it is no whole launch."""

import pytest
from cases import each

from patchssl.runtime.distributed import join_launched, local_rank, lost_peer, peer_sentence
from patchssl.runtime.errors import UsageError

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID",
         "SLURM_NTASKS", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@each(("env", "words"), [
    ({"WORLD_SIZE": "2"}, "holds WORLD_SIZE=2, but no RANK, MASTER_ADDR, MASTER_PORT: .*torchrun --nproc"),
    ({"RANK": "1"}, "holds RANK=1, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT: .*torchrun"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number"),
    ({"RANK": "-1"}, "RANK=-1 in the environment is no number"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 .* none of WORLD_SIZE=2"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"},
     "srun started 2 tasks of this command, .* torchrun .* --slurm.* WORLD_SIZE=1"),
])
def test_half_a_launch_is_a_sentence(monkeypatch, env, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        join_launched()
    for name in env:
        monkeypatch.delenv(name)


@each("env", [
    {},
    {"WORLD_SIZE": "1"},
    {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"RANK": "0"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of a job
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "WORLD_SIZE": "1"},  # as the sentence says
])
def test_one_process_stays_one(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    join_launched()
    for name in env:
        monkeypatch.delenv(name)


def test_a_local_rank_that_is_no_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(UsageError, match="LOCAL_RANK=x in the environment is no number"):
        local_rank()


@each(("text", "lost"), [
    ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3", True),
    ("NCCL error: remote process exited or there was a network error", True), ("mat1 and mat2 do not fit", False)])
def test_the_word_of_a_lost_peer(monkeypatch, text, lost):
    monkeypatch.setattr("patchssl.runtime.distributed.world_size", lambda: 2)
    assert lost_peer(RuntimeError(text)) is lost
    assert "another of the 2 processes of this command ended" in peer_sentence(RuntimeError(text))
    monkeypatch.setattr("patchssl.runtime.distributed.world_size", lambda: 1)
    assert not lost_peer(RuntimeError(text))
