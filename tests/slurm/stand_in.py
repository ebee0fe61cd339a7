"""Commands in Slurm's place; they answer for sixteen nodes with eight GPUs each, and submit nothing."""

from __future__ import annotations

from pathlib import Path

PARTITION = {
    "PartitionName": "main",
    "AllowGroups": "ALL",
    "AllowAccounts": "ALL",
    "Default": "YES",
    "MaxTime": "UNLIMITED",
    "Nodes": "n[1-16]",
    "State": "UP",
    "TotalNodes": "16",
}
SCONTROL = """#!/bin/sh
case "$2" in
    partition) echo '{partition}' ;;
    node) echo 'NodeName=n1 Gres={gres} State=IDLE' ;;
    job) echo '{jobs}' ;;
esac
"""
SBATCH = """#!/bin/sh
echo "$@" >> {told}
echo $((100 + $(wc -l < {told})))
"""


def write_commands(
    folder: Path, gres: str = "gpu:8", jobs: str = "No jobs in the system", **partition: str | None
) -> Path:
    """sbatch, scontrol, squeue and scancel in ``folder``; the file to which sbatch writes what it is told.

    Args:
        gres: of a node.
        jobs: what `scontrol show job` prints.
        partition: what `scontrol show partition` tells otherwise; of None, nothing.
    """
    line = " ".join(f"{key}={value}" for key, value in (PARTITION | partition).items() if value is not None)
    folder.mkdir(exist_ok=True)
    told = folder / "told"
    told.write_text("")
    texts = {
        "scontrol": SCONTROL.format(partition=line, gres=gres, jobs=jobs),
        "sbatch": SBATCH.format(told=told),
    }
    for name in ("sbatch", "scontrol", "squeue", "scancel"):
        (folder / name).write_text(texts.get(name, "#!/bin/sh\n"))
        (folder / name).chmod(0o755)
    return told
