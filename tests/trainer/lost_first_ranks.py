"""A rank of `test_lone_fault.py`: `bitdance train`, whose rank 0 is killed while it looks for the run."""

import os
import signal
import sys

import torch.distributed as dist

import bitdance
import trainer.cli


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


trainer.cli._unfinished = killed  # type: ignore[assignment]
# The real one imports DeepSpeed, for seconds.
sys.modules["trainer.engine"] = type(sys)("engine")
sys.modules["trainer.engine"].start_distributed = lambda: dist.init_process_group("gloo")  # type: ignore[attr-defined]
sys.argv = ["bitdance", "train", sys.argv[1]]
bitdance.main()
