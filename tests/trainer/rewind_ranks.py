"""One rank of `test_rewind.py`: goes back to the newest checkpoint while a save is still being written;
then once more, while the file system fails on rank 1.

Argument: the run folder.
"""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from foundation.errors import UserError
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.flat_shards import FlatShard
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.run_folder import RunFolder, take_start


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, run = dist.get_rank(), RunFolder(folder)
    if rank == 0:
        run.checkpoints.mkdir(parents=True)
        run.starts.mkdir()
        take_start(run, 0, 2)
    dist.barrier()
    events = EventLog(run, 1, writes=rank == 0)
    checkpoints = Checkpoints(run, 1, CheckpointSection(), "0" * 64, {"parent": None}, events)

    def shards(value: float) -> dict[str, FlatShard]:
        return {"master/a": FlatShard(torch.full((4,), value), 4 * rank, 8)}

    checkpoints.save(1, shards(1.0), {})
    checkpoints.wait()
    describe = checkpoint.describe_file

    def slowly(path: Path) -> dict[str, Any]:
        time.sleep(2.0 * rank)  # one rank's disk is slower
        return describe(path)

    checkpoint.describe_file = slowly  # type: ignore[attr-defined]
    checkpoints.save(2, shards(2.0), {})
    time.sleep(0.5)  # into the midst of it
    into = shards(0.0)
    manifest = checkpoints.load_newest(into)
    print(f"back to {manifest and manifest.step}: {into['master/a'].values.tolist()}")
    checkpoints.save(3, shards(3.0), {})
    checkpoints.wait()
    if rank == 1:
        checkpoint.damage = out_of_reach  # type: ignore[attr-defined]
    try:
        checkpoints.load_newest(into)
    except UserError as error:
        print(f"ends with {int(error.exit_code)}: {error}")
    dist.destroy_process_group()


def out_of_reach(*_: object) -> list[str]:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
