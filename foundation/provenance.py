"""Where a result came from: the code's revision, the versions it ran with, the host. Never the environment,
which holds keys."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "bitdance-trainer",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "mosaicml-streaming",
    "webdataset",
    "numpy",
    "pillow",
    "safetensors",
    "wandb",
    "s3fs",
    "flash-attn",
)


def provenance() -> dict[str, Any]:
    """Git revision, package versions, Python and host, as plain JSON values."""
    return {
        "git": git_revision(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
    }


def package_version(name: str) -> str | None:
    """The installed version of ``name``, None where it isn't installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of the code that runs, ``-dirty`` where files differ from it; None outside a checkout."""
    home = Path(__file__).resolve().parent
    command = ["git", "-C", str(home), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
