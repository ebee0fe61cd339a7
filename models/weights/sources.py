"""Where weights come from: a path on this machine, or ``hf:owner/name`` on the hub."""

from __future__ import annotations

import re
from pathlib import Path

HUB_PREFIX = "hf:"
# What a published model consists of. Nothing else of a repository is fetched: no code, no pickles.
FOLDER_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.jinja"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+\.(?:pt|safetensors))?")


def locate(source: str | Path) -> Path:
    """The local path of ``source``, fetched from the hub where it begins with ``hf:``.

    ``hf:owner/name`` fetches a folder of safetensors and configs; ``hf:owner/name/file.pt`` one file, and
    ``hf:owner/name/file.safetensors`` that with its ``file_config.json``. What has been fetched before is not
    fetched again.

    Raises:
        ValueError: nothing is there, the name is malformed, or the hub cannot be reached.
    """
    text = str(source)
    if not text.startswith(HUB_PREFIX):
        path = Path(source)
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; expected one, or hf:owner/name for the hub")
        return path
    name = text.removeprefix(HUB_PREFIX)
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{text}: expected hf:owner/name, or hf:owner/name/file.pt (or .safetensors) for one file of it"
        )
    owner, repository, *rest = name.split("/", 2)
    return Path(_fetch(f"{owner}/{repository}", rest[0] if rest else None))


def _fetch(repository: str, file: str | None) -> str:
    # Imported here: nobody with a local path needs the hub's client.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if file is not None and file.endswith(".safetensors"):
            hf_hub_download(repository, f"{file.removesuffix('.safetensors')}_config.json")
        if file is not None:
            return str(hf_hub_download(repository, file))
        return str(snapshot_download(repository, allow_patterns=FOLDER_FILES))
    # ValueError and OSError cover what the client raises when offline, without space, or for bad names.
    except (HfHubHTTPError, OSError, ValueError) as error:
        what = f"{repository}/{file}" if file else repository
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{HUB_PREFIX}{what}: cannot be fetched from the Hugging Face hub ({reason}). Check the name, "
            "your access to it (`hf auth login`) and the connection; without one, copy the folder to this "
            "machine and give its path"
        ) from error
