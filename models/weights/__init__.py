"""Published weights in and out.

torch_files.py        `.pt` files, read without running code
sources.py            a local path, or hf:owner/name
layout.py             the published text-to-image folder, as names and rules
source.py             such a folder, opened and checked, nothing read
grow.py               p = 4 -> p = 8
folder.py             such a folder, loaded or written
modules.py            modules without memory, and the weights that stream into them
tokenizer_weights.py  the binary tokenizer's `.pt`
class_conditional.py  the class-conditional models' `.pt`, and our folder of them
kinds.py              which of the three kinds, for the commands
"""

from models.tensor_files.strict import TensorSpec
from models.weights.folder import (
    FolderWriter,
    LoadedModel,
    build_model,
    load_folder,
    save_folder,
    write_source,
)
from models.weights.grow import grow_patch
from models.weights.source import (
    ModelSource,
    expected_specs,
    open_folder,
    read_folder_config,
    stored_specs,
)
from models.weights.sources import locate

__all__ = [
    "FolderWriter",
    "LoadedModel",
    "ModelSource",
    "TensorSpec",
    "build_model",
    "expected_specs",
    "grow_patch",
    "load_folder",
    "locate",
    "open_folder",
    "read_folder_config",
    "save_folder",
    "stored_specs",
    "write_source",
]
