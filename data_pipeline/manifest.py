"""The layout of a latent dataset, and its manifest.

A dataset is a folder (local, or a prefix of an object store):

    manifest.json          written last; a dataset without it is not finished (`Manifest` below)
    index.json             MDS index of the shards of all classes: the classes by rising resolution, in a
                           class the tasks by number, in a task its shards. Base names are paths relative to
                           the dataset's folder: the whole folder is one `StreamingDataset` without a split
    tasks/NNNNN/           one per input shard; appears whole, by one rename, and is never rewritten
        done.json          the marker: counts, hashes, fingerprint, code version, and its own hash
        samples.parquet    a row per record: class, row, key, bucket, n_text, perceptual hash, cropped share
        quarantine.jsonl   a line per sample that was refused or fits no class: key and reason
        128/, 256/, ...    an MDS folder (index.json, shard.00000.mds, ...) for each resolution class
    side-XXXXXXXX/128/, ...   the side index of each class: `.npy` files that can be memory-mapped
        n_text.npy         uint16 [samples]: caption tokens of each kept sample
        bucket.npy         uint8 [samples]: place of its bucket in the class's `buckets`
        shard_sizes.npy    uint32 [shards]: kept samples of each shard
        dropped.npy        int64 [raw_samples - samples], sorted: raw positions in the class that are left out
                           as near-duplicates; usually empty
    given_up/NNNNN.json    a task that the dataset goes without, and why
    damaged/NNNNN.json     a task that was found damaged; there until it is made anew
    text_tokenizer/        where the recipe trained one on the captions
    recipe.json            the tokenize recipe that made the folder; another recipe is refused

Ids. A class has `raw_samples` records in its shards, numbered from 0 in the index's order (the *raw*
position), of which `samples` are kept; a *sample id* numbers the kept ones without gaps. `raw_positions` maps
ids to raw positions; a record's place in the whole `index.json` is its raw position + `first_sample` of its
class. The side index costs 3 bytes a sample.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from foundation.errors import DataError

MANIFEST_NAME = "manifest.json"
LAYOUT_VERSION: Literal[1] = 1
SIDE_FILES = ("n_text.npy", "bucket.npy", "shard_sizes.npy", "dropped.npy")


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """Size in bytes and sha256 (hex) of one file of the dataset."""

    bytes: int = pydantic.Field(ge=0)
    sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")


class ClassManifest(_Part):
    """One resolution class.

    Attributes:
        resolution: nominal side in pixels, the class's name.
        buckets: `(height, width)` in pixels; `bucket.npy` holds places in this list. The token grid is
            each side divided by the manifest's `downsample`.
        first_shard: the class's first shard in `index.json`.
        shards: number of its shards, consecutive from `first_shard`.
        first_sample: raw samples of the classes before it.
        raw_samples: records in its shards.
        samples: records kept.
        side: folder of its side index, relative to the dataset.
    """

    resolution: int = pydantic.Field(gt=0)
    buckets: list[tuple[int, int]] = pydantic.Field(min_length=1, max_length=256)
    first_shard: int = pydantic.Field(ge=0)
    shards: int = pydantic.Field(ge=0)
    first_sample: int = pydantic.Field(ge=0)
    raw_samples: int = pydantic.Field(ge=0)
    samples: int = pydantic.Field(ge=0)
    side: str


class TextTokenizerManifest(_Part):
    """The text tokenizer that `n_text` was counted with.

    Attributes:
        name: folder or hub name; a folder inside the dataset is given relative to the dataset.
        inside: whether `name` is a folder inside the dataset.
        vocab_size: entries, added tokens included.
        sha256: hash over the vocabulary (see `tokenize/captions.py`); equal tokenizers have equal hashes.
    """

    name: str
    inside: bool
    vocab_size: int
    sha256: str


class TokenizerManifest(_Part):
    """The binary tokenizer that made the bits; a trainer refuses a dataset that another one made."""

    fingerprint: str
    downsample: int = pydantic.Field(gt=0)
    bits_per_token: int = pydantic.Field(gt=0)
    dtype: Literal["float32", "bfloat16"]
    folder: str


class Manifest(_Part):
    """`manifest.json`: everything that a reader needs to know before it opens a shard.

    Attributes:
        layout: version of this layout.
        code_version: version of this package that finished the dataset.
        recipe_sha256: hash of the tokenize recipe.
        tokenizer: the binary tokenizer.
        text_tokenizer: what `n_text` was counted with.
        classes: by rising resolution, in the order of `index.json`.
        tasks: number of tasks.
        given_up: those of them that the dataset goes without, sorted; in the file only where there are any.
        quarantined: samples that were refused while tokenizing.
        near_duplicates: samples left out as near-duplicates, over all classes.
        files: `index.json`, side index and text tokenizer: path relative to the dataset -> size and hash.
            The shards' own hashes are in `index.json`.
    """

    layout: Literal[1] = LAYOUT_VERSION
    code_version: str
    recipe_sha256: str
    tokenizer: TokenizerManifest
    text_tokenizer: TextTokenizerManifest
    classes: list[ClassManifest]
    tasks: int
    given_up: list[int] = []
    quarantined: int
    near_duplicates: int
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        """Canonical text: sorted keys, so that equal manifests are equal files."""
        values = self.model_dump(mode="json", exclude=set() if self.given_up else {"given_up"})
        return json.dumps(values, sort_keys=True, indent=1) + "\n"

    def sha256(self) -> str:
        """Hash of the manifest's text: the dataset's identity, as a run's lineage records it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Read a manifest's text.

    Args:
        text: content of `manifest.json`.
        where: path, for the message.

    Raises:
        DataError: not JSON, another layout version, or a field that is missing, unknown or impossible.
    """
    try:
        return Manifest.model_validate_json(text)
    except pydantic.ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        raise DataError(
            f"{where} is not a manifest of a latent dataset of layout {LAYOUT_VERSION}:\n"
            + "\n".join(lines)
            + "\nRun `bitdance data finalize` on the folder again, with this version of the code."
        ) from None


def raw_positions(sample_ids: NDArray[np.int64], dropped: NDArray[np.int64]) -> NDArray[np.int64]:
    """Raw positions in the class of the given sample ids.

    Args:
        sample_ids: int64 `[n]`, each in `[0, samples)`.
        dropped: int64 `[k]`, sorted raw positions that are left out.

    Returns:
        int64 `[n]`: `i + searchsorted(dropped - arange(k), i, side="right")`.
    """
    gaps = dropped - np.arange(len(dropped), dtype=np.int64)
    return sample_ids + np.searchsorted(gaps, sample_ids, side="right")
