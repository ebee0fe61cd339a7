"""One rank of a training job: `python -m slurm.rank RECIPE`, as srun starts it on each node.

Nothing heavy is imported before signals are caught, and what a node's interpreter may lack only where it can
be told.
"""

from __future__ import annotations

import gc
import os
import sys

from foundation.errors import ExitCode
from trainer.signals import StopFlag


def main(arguments: list[str] | None = None) -> int:
    """Name this node where its Python is another one; else do what `start` does, and leave."""
    stop = StopFlag()
    stop.install()
    gc.disable()  # until all is imported: `trainer.rank` says why, and enables it
    try:
        import slurm.interconnect  # noqa: F401  (torch and DeepSpeed's relatives)
        from slurm.start import start
        from trainer.rank import leave
    except (ImportError, SyntaxError) as error:
        node = os.environ.get("SLURMD_NODENAME", "?")
        print(f"bitdance: bad node {node}: {sys.executable} cannot run this code ({error})", flush=True)
        return ExitCode.REQUEUE
    leave(start(stop, arguments))


if __name__ == "__main__":
    sys.exit(main())
