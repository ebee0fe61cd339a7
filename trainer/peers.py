"""What the ranks of a start know of each other's faults, so that one fault is told once and ends all of them.

A rank that meets a fault alone leaves while the others wait for it in a collective: for half an hour, or
until its connections close, which they would then tell as a fault of their own. So it notes its fault in the
start's store first, and every rank looks there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from foundation.errors import ExitCode, RecipeError, UserError
from trainer.lost_ranks import RankLost, lost_another

T = TypeVar("T")
LAST_WAIT = 10.0  # seconds
LOOK_SECONDS = 1.0  # between two looks for a fault of another rank
HEED_SECONDS = 3.0  # in which a rank may come to an end by itself: it may have met the same fault


def stop_distributed(waits: Callable[[], bool] = lambda: True) -> None:
    """Leave the process group; without this, now and then a process aborts at its exit.

    Rank 0, from which the others hear last, goes last: what it has said could be lost with its connections.
    It does not wait for long, and only while ``waits`` says so.
    """
    if not dist.is_initialized():
        return
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with suppress(dist.DistError):  # of a rank, or a store, that is gone already
        if rank:
            _say_left(rank)
        elif ranks > 1:
            others = [f"left/{other}" for other in range(1, ranks)]
            last = time.monotonic() + LAST_WAIT
            while not _get_default_store().check(others) and waits() and time.monotonic() < last:
                time.sleep(0.02)
    dist.destroy_process_group()


def _say_left(rank: int) -> None:
    _get_default_store().set(f"left/{rank}", "")


def refuse_shared_gpus(host: str, gpu: str) -> None:
    """Collective, but over the start's store alone: where two ranks have one GPU, NCCL fails at its first
    collective.

    Args:
        host, gpu: this rank's; a GPU's name is its own on its host.

    Raises:
        RecipeError: on all ranks, where some share a GPU.
    """
    store, ranks = _get_default_store(), dist.get_world_size()
    store.set(f"gpu/{dist.get_rank()}", json.dumps([host, gpu]))
    places = [json.loads(place) for place in store.multi_get([f"gpu/{rank}" for rank in range(ranks)])]
    gpus: dict[str, list[str]] = {}
    for where, name in places:
        gpus.setdefault(where, []).append(name)
    crowded = [
        f"{where} has {len(set(names))} for {len(names)} ranks"
        for where, names in gpus.items()
        if len(set(names)) < len(names)
    ]
    if crowded:
        raise RecipeError(
            f"Each rank needs a GPU of its own: {', '.join(crowded)}. Set world.processes (under torchrun "
            "--nproc-per-node, under srun the tasks of a node) to the number of GPUs"
        )


def decided_by_first(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on all ranks (collective).

    Raises:
        UserError, OSError: on all ranks, what rank 0 has met.
        RankLost: rank 0 is gone.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [decide()]
        except (UserError, OSError) as error:
            answer = [error]
    try:
        dist.broadcast_object_list(answer, src=0)
    except RuntimeError as error:
        if not lost_another(error):
            raise
        raise RankLost(
            f"rank {dist.get_rank()} has lost rank 0, which was about to say how to go on; its own words "
            "tell why. The same command goes on from the last checkpoint."
        ) from error
    if isinstance(answer[0], UserError | OSError):
        raise answer[0]
    decision: T = answer[0]
    return decision


def first_to_say(error: UserError) -> bool:
    """Whether no other rank of this start has said it: what all ranks find is told once."""
    if dist.is_initialized():
        with suppress(dist.DistError):  # the store is gone: better twice than not at all
            store = _get_default_store()
            store.set("fault", str(int(error.exit_code)))
            said = hashlib.sha256(str(error).encode()).hexdigest()
            first: bool = store.add(f"said/{said}", 1) == 1
            return first
    return True


def told_fault() -> ExitCode | None:
    """The exit code of a fault that some rank has told; None where none has, or none can be asked."""
    if dist.is_initialized():
        with suppress(dist.DistError):
            store = _get_default_store()
            return ExitCode(int(store.get("fault"))) if store.check(["fault"]) else None
    return None


@contextmanager
def ends_with_others() -> Iterator[None]:
    """End the process with its exit code, where another rank has told a fault and the block does not end.

    A thread looks, since the main one waits in a collective for a rank that has left. It can't be woken up
    there: rank 0, whose process the store lives in, keeps its connections until all others have left.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            code = told_fault()
            if code is not None and not over.wait(HEED_SECONDS):
                print(
                    "Another rank has met a fault and said so; this one ends with it",
                    file=sys.stderr,
                    flush=True,
                )
                if rank := dist.get_rank():
                    _say_left(rank)
                os._exit(code)

    threading.Thread(target=look, name="other ranks' faults", daemon=True).start()
    try:
        yield
    finally:
        over.set()
