"""img2dataset, in an environment of its own that uv makes, for as long as this process lives.

It needs older libraries than ours. What it runs inside is `guard.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from data_pipeline.download.recipe import DownloadRecipe
from foundation.errors import ExitCode, RecipeError, UserError
from foundation.files import atomic_write
from foundation.provenance import package_version

TOOL = "img2dataset==1.47.0"
AGENT_TOKEN = "bitdance"
OPT_OUT = ["noai", "noimageai", "noindex", "noimageindex"]
SECRETS = ("AWS_", "WANDB_", "HF_", "HUGGING")  # of the environment: the tool has no use for them


class DownloadStopped(UserError):
    """The tool ended before every row was accounted for; the same command goes on."""

    exit_code = ExitCode.REQUEUE


def find_uv() -> str:
    """The program uv, on the path or beside this Python; RecipeError where it is not."""
    beside = Path(sys.executable).with_name("uv")
    found = shutil.which("uv") or (str(beside) if beside.exists() else None)
    if found is None:
        raise RecipeError(
            f"uv is not installed, and {TOOL} runs in an environment that it makes: pip install uv"
        )
    return found


def tool_command(uv: str) -> list[str]:
    """The Python of the tool's own environment, which uv makes on first use.

    Asked for by its path: uv would stay between this process and the tool, and outlive this one.

    Raises:
        DownloadStopped: uv cannot make it; what it says has gone to the terminal.
    """
    # -I: neither this folder nor the environment's variables add anything to what the tool imports.
    ask = [uv, "tool", "run", "--python", sys.executable, "--from", TOOL, "python", "-I"]
    ask += ["-c", "import sys; print(sys.executable)"]
    made = subprocess.run(ask, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode:
        raise DownloadStopped(
            f"uv cannot make the environment of {TOOL} (exit code {made.returncode}); its last lines say "
            "why. The same command goes on."
        )
    return [made.stdout.strip(), "-I"]


def run_tool(command: list[str], recipe: DownloadRecipe, output: Path, lock: IO[str]) -> int:
    """Run the tool on `output`'s rows; its exit code.

    Args:
        command: of `tool_command`.
        recipe: what to fetch and how.
        output: the output folder, with its rows.
        lock: an open file that all processes of the tool keep open. They are killed when this one is.
    """
    import pyarrow.parquet as pq

    columns = pq.ParquetFile(next((output / "rows").glob("*.parquet"))).schema_arrow.names
    carried = [name for name in columns if name not in ("url", "caption", "sha256")]
    version = package_version("bitdance-trainer") or "0"
    settings = {
        "user_agent": f"Mozilla/5.0 (compatible; {AGENT_TOKEN}/{version}; +{recipe.polite.contact})",
        "agent_token": AGENT_TOKEN,
        "respect_opt_out": recipe.polite.respect_opt_out,
        "private_addresses": recipe.polite.private_addresses,
        "max_bytes": int(recipe.limits.max_megabytes * 1e6),
        "total_seconds": recipe.limits.total_seconds,
        "arguments": tool_arguments(recipe, output, carried),
    }
    path = (output / "settings.json").absolute()
    with atomic_write(path) as file:
        file.write(json.dumps(settings, indent=1) + "\n")
    guard = Path(__file__).with_name("guard.py")
    started = [*command, str(guard), str(path), str(os.getpid()), str(lock.fileno())]
    return subprocess.run(started, env=_environment(), pass_fds=(lock.fileno(),), check=False).returncode


def tool_arguments(recipe: DownloadRecipe, output: Path, carried: list[str]) -> dict[str, Any]:
    """Arguments of img2dataset's `download`."""
    return {
        "url_list": str((output / "rows").absolute()),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": carried or None,
        "verify_hash": ["sha256", "sha256"] if recipe.verify_sha256 else None,
        "compute_hash": "sha256",
        "output_folder": str((output / "shards").absolute()),
        "output_format": "webdataset",
        "number_sample_per_shard": recipe.samples_per_shard,
        "image_size": recipe.pictures.side,
        "resize_mode": recipe.pictures.resize,
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": recipe.pictures.quality,
        "min_image_size": recipe.pictures.min_side,
        "timeout": recipe.limits.stall_seconds,
        "retries": recipe.limits.retries,
        "user_agent_token": AGENT_TOKEN,
        "disallowed_header_directives": OPT_OUT if recipe.polite.respect_opt_out else [],
        "processes_count": recipe.compute.processes,
        "thread_count": recipe.compute.threads,
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
