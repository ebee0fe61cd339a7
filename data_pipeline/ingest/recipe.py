"""The part of a recipe that says which image shards to read, and which of their samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from foundation.sections import Section


class InputSection(Section):
    """Pictures, as a list of shards; each shard is a task of its own.

    Attributes:
        kind: what `path` leads to:
            `webdataset`: tars of img2dataset and the like, a shard each;
            `folder`: folders of pictures, captions in `.txt` files of the same names;
            `classes`: a folder of one folder per class, whose name is the caption (hidden files, and what
            macOS adds to archives, are not looked at in either);
            `class_tars`: ImageNet's tar of one tar per class, unpacked once: a shard each, its name the
            caption; `jsonl`: manifests, a line `{"image": path, "caption": text}` per picture; `parquet`:
            Hugging Face parquet with an `image` column, of `{bytes, path}` or of bytes, a shard per file.
        path: paths, globs or `s3://` addresses.
        captions: for `classes` and `class_tars`: a JSON file, class name -> caption.
        caption_column: for `parquet`.
        samples_per_shard: for `folder`, `classes` and `jsonl`.
        incomplete: what to do with a tar that lacks its `_stats.json` while its neighbours have theirs (the
            downloader writes it last, so the tar may be cut short): `refuse` the job, `skip` it, or `read`
            it.
        max_member_bytes: cap on the size of one picture's file.
    """

    kind: Literal["webdataset", "folder", "classes", "class_tars", "jsonl", "parquet"] = "webdataset"
    path: list[str] = Field(min_length=1)
    captions: str | None = None
    caption_column: str = "text"
    samples_per_shard: int = Field(default=4096, gt=0)
    incomplete: Literal["refuse", "skip", "read"] = "refuse"
    max_member_bytes: int = Field(default=256 << 20, gt=0)


class KeepSection(Section):
    """Only samples that a filter has kept; its captions and scores go before those of the shards.

    Attributes:
        rows: the filter's `kept.parquet`.
        by: the column that rows and samples share.
    """

    rows: str
    by: Literal["uid", "hash", "url", "sha256"]
