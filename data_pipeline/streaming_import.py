"""The one place that imports mosaicml-streaming: everybody else takes its parts from here.

`streaming` imports torchvision for its own picture datasets, which nobody here uses; torchvision has no
build for a machine without CUDA and is a large dependency. An empty module in its place saves it.
"""

import sys
import types

sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))

from streaming import MDSWriter, StreamingDataset  # noqa: E402
from streaming.base.format.mds import MDSReader  # noqa: E402
from streaming.base.hashing import get_hash, get_hashes  # noqa: E402
from streaming.base.storage import CloudDownloader  # noqa: E402

__all__ = [
    "CloudDownloader",
    "MDSReader",
    "MDSWriter",
    "StreamingDataset",
    "get_hash",
    "get_hashes",
]
