"""What a job and its submission find around them: the submitter's shell and groups."""

import os

import pytest

from foundation.errors import Problems
from slurm import checks
from slurm.site import Site
from slurm.start import of_srun
from trainer.rank import distributed_variables


def test_the_submitters_ranks_are_not_the_jobs() -> None:
    shell = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    environment = shell | srun | {"MASTER_ADDR": "n1", "MASTER_PORT": "15000"}
    found = distributed_variables(environment | of_srun(environment))
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "4", "1")


@pytest.mark.parametrize(("allowed", "complaints"), [("ALL", 0), ("staff", 1)])
def test_a_group_without_a_name(monkeypatch: pytest.MonkeyPatch, allowed: str, complaints: int) -> None:
    monkeypatch.setattr(os, "getgroups", lambda: [4_000_000_001])
    problems = Problems()
    partition = {"PartitionName": "main", "State": "UP", "AllowGroups": allowed}
    checks._check_permission(problems, Site(), partition)
    assert len(problems.lines) == complaints
