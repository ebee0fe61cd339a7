"""`bitdance submit` with commands in Slurm's place: sixteen nodes of eight GPUs; nothing is submitted."""

from __future__ import annotations

import sys
from pathlib import Path

from small_stage import write_recipe
from typer.testing import CliRunner

from foundation.errors import RecipeError
from slurm.cli import app

ROOT = Path(__file__).parents[2]
PARTITION = {
    "PartitionName": "main",
    "AllowGroups": "ALL",
    "AllowAccounts": "ALL",
    "Default": "YES",
    "DefaultTime": "NONE",
    "MaxTime": "UNLIMITED",
    "Nodes": "n[1-16]",
    "State": "UP",
    "TotalNodes": "16",
}
SCONTROL = """#!/bin/sh
case "$2" in
    partition) echo '{partitions}' ;;
    node) for number in $(seq 16); do echo "NodeName=n$number "'Gres={gres} State=IDLE'; done ;;
    job) echo '{jobs}' ;;
esac
"""
SBATCH = """#!/bin/sh
echo "$@" >> {told}
echo $((100 + $(wc -l < {told})))
"""


def partition_line(**values: str | None) -> str:
    """What `scontrol show partition --oneliner` tells of one; nothing of what is None."""
    return " ".join(f"{key}={value}" for key, value in (PARTITION | values).items() if value is not None)


def write_commands(
    folder: Path,
    gres: str = "gpu:8",
    jobs: str = "No jobs in the system",
    second: str = "",
    **partition: str | None,
) -> Path:
    """sbatch, scontrol, squeue and scancel in ``folder``; the file to which sbatch writes what it is told.

    Args:
        gres: of a node.
        jobs: what `scontrol show job` prints.
        second: line of another partition, after a line end.
        partition: what `scontrol show partition` tells otherwise; of None, nothing.
    """
    folder.mkdir(exist_ok=True)
    told = folder / "told"
    told.write_text("")
    texts = {
        "scontrol": SCONTROL.format(partitions=partition_line(**partition) + second, gres=gres, jobs=jobs),
        "sbatch": SBATCH.format(told=told),
    }
    for name in ("sbatch", "scontrol", "squeue", "scancel"):
        (folder / name).write_text(texts.get(name, "#!/bin/sh\n"))
        (folder / name).chmod(0o755)
    return told


def site_file(folder: Path, **more: str) -> Path:
    values = {"GPUS_PER_NODE": "0", "SHARED_FOLDERS": f"{ROOT}:{sys.prefix}:/tmp"} | more
    path = folder / "site.env"
    path.write_text("".join(f'{key}="{value}"\n' for key, value in values.items()))
    return path


def submit(folder: Path, *arguments: str, **site: str) -> str:
    """What `bitdance submit` prints, or the message with which it refuses."""
    words = ["submit", *arguments, "--site", str(site_file(folder, **site))]
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, RecipeError):
        return str(result.exception)
    assert result.exception is None, result.exception
    return result.stdout


def stage(inputs: Path, folder: Path, **changes: object) -> Path:
    """A recipe whose run folder is the test's own."""
    changes = {"run": str(folder / "run"), **changes}
    return write_recipe(inputs, f"{folder.name}.yaml", **changes)


def export(folder: Path) -> None:
    """The run's export, as far as its submission looks at it."""
    (folder / "run" / "export").mkdir(parents=True)
    (folder / "run" / "export" / "export.json").write_text('{"step": 6}')


def tokenize_values(folder: Path) -> dict[str, object]:
    """A recipe of `data tokenize` that names every kind of input, all of them below ``folder``."""
    return {
        "input": {
            "path": [f"{folder}/shards", f"{folder}/more/*.tar"],
            "captions": f"{folder}/captions.json",
        },
        "keep": {"rows": f"{folder}/kept.parquet", "by": "uid"},
        "tokenizer": f"{folder}/tokenizer",
        "text_tokenizer": {"name": f"{folder}/text"},
        "output": f"{folder}/latents",
        "classes": [{"resolution": 128, "buckets": [[128, 128]]}],
    }


def filter_values(folder: Path) -> dict[str, object]:
    """The same, of `data filter`."""
    return {
        "sources": [f"{folder}/rows.parquet", f"{folder}/parts/**/*.parquet"],
        "joins": [{"files": [f"{folder}/scores"], "by": "uid", "columns": {"aesthetic": "score"}}],
        "rules": [{"rule": "score", "column": "aesthetic", "above": 5}],
        "output": f"{folder}/kept",
    }
