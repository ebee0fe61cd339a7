"""What tests of checkpoints share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer.run_folder import RunFolder


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process is the only rank."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder that has not been started."""
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    run.starts.mkdir()
    return run
