"""The process's place in its job, under torchrun, srun and plain python."""

from __future__ import annotations

import re

import pytest

from megatron.launch.environment import LaunchEnvironment, LaunchEnvironmentError, expand_hosts

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
}


def test_torchruns_variables_are_read():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert LaunchEnvironment.from_environ(environ | {"MASTER_ADDR": "h", "MASTER_PORT": "1"} | SLURM) == LaunchEnvironment(
        5, 8, 1, 4, "torchrun", "h", 1
    )


def test_slurms_variables_are_read():
    env = LaunchEnvironment.from_environ(SLURM)
    assert (env.rank, env.world_size, env.local_rank, env.local_size, env.address) == (3, 4, 1, 2, "node07")
    assert env.launcher == "srun" and 20000 <= env.port < 32000
    assert LaunchEnvironment.from_environ(SLURM | {"SLURM_STEP_ID": "1"}).port != env.port


def test_a_batch_script_is_one_process():
    """Outside of srun a batch script has SLURM_PROCID and SLURM_NTASKS too; waiting for the others would be for ever."""
    assert (
        LaunchEnvironment.from_environ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) == LaunchEnvironment()
    )


def test_plain_python_is_one_process():
    assert LaunchEnvironment.from_environ({}) == LaunchEnvironment()


def test_a_broken_variable_is_named():
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many', not a number"):
        LaunchEnvironment.from_environ({"RANK": "0", "WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("environ", "said", "own"),
    [
        ("RANK=x WORLD_SIZE=2", "RANK is 'x', not a number", True),
        ("RANK=-1 WORLD_SIZE=2", "RANK is '-1', not a number", True),
        ("RANK=² WORLD_SIZE=2", "RANK is '²', not a number", True),
        ("RANK=2 WORLD_SIZE=2", "RANK is 2, and WORLD_SIZE 2; legal: 0 to 1", True),
        ("RANK=3", "RANK is 3, and WORLD_SIZE 1", True),
        ("WORLD_SIZE=2", "RANK is not set", True),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE is 0; legal: 1 and above", False),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK is 2, and LOCAL_WORLD_SIZE 2", True),
        ("RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3", "LOCAL_WORLD_SIZE is 3, and WORLD_SIZE 2", False),
        ("RANK=1 WORLD_SIZE=2 MASTER_PORT=http", "MASTER_PORT is 'http', not a number", False),
        ("RANK=1 WORLD_SIZE=2 MASTER_PORT=0", "MASTER_PORT is 0; legal: 1 to 65535", False),
        ("RANK=1 WORLD_SIZE=2 MASTER_PORT=70000", "MASTER_PORT is 70000", False),
    ],
)
def test_impossible_variables_are_refused(environ, said, own):
    """own: the process itself must say it, where it may be the only one of which it is true."""
    with pytest.raises(LaunchEnvironmentError, match=re.escape(f"the environment variable {said}")) as error:
        LaunchEnvironment.from_environ(dict(pair.split("=") for pair in environ.split()))
    assert error.value.own == own


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_NODELIST", "MASTER_PORT"])
def test_what_slurm_cannot_mean_is_refused(name):
    for value in {"SLURM_PROCID": ("4", "x"), "SLURM_STEP_NODELIST": ("n[1-x]",), "MASTER_PORT": ("x", "99999")}[name]:
        with pytest.raises(LaunchEnvironmentError, match=name):
            LaunchEnvironment.from_environ(SLURM | {name: value})


def test_one_host_is_assumed_where_nothing_says_otherwise():
    env = LaunchEnvironment.from_environ({"RANK": "3", "WORLD_SIZE": "4"})
    assert (env.local_rank, env.local_size) == (3, 4)
    assert LaunchEnvironment.from_environ({"RANK": "0", "MASTER_ADDR": ""}).address == "127.0.0.1"


def test_slurms_host_lists_are_expanded():
    assert expand_hosts("n[1-3,07],head,gpu[2]-ib") == ["n1", "n2", "n3", "n07", "head", "gpu2-ib"]


def test_blocking_launches_are_read_with_the_rest():
    one = {"RANK": "0", "WORLD_SIZE": "2"}
    assert [LaunchEnvironment.from_environ(one | {"CUDA_LAUNCH_BLOCKING": value}).blocking for value in ("1", "0", "")] == [
        True,
        False,
        False,
    ]
    assert (
        LaunchEnvironment.from_environ({"CUDA_LAUNCH_BLOCKING": "1"}).blocking
        and LaunchEnvironment.from_environ(SLURM | {"CUDA_LAUNCH_BLOCKING": "1"}).blocking
    )
