"""How long rank 0 waits for the others before it leaves, and what they make of its death."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from foundation.errors import ExitCode, RecipeError
from trainer import peers
from trainer.lost_ranks import RankLost, lost_another
from trainer.peers import decided_by_first


@pytest.mark.parametrize(
    ("left", "waits", "limit", "least"),
    [
        (lambda: True, lambda: True, 60.0, 0.0),  # all have left
        (lambda: False, lambda: False, 60.0, 0.0),  # a rank was killed, and the batch system said so
        (lambda: False, lambda: True, 0.3, 0.3),  # nobody has said anything
    ],
)
def test_rank_zero_leaves_last_but_does_not_wait_for_the_dead(
    monkeypatch: pytest.MonkeyPatch,
    left: Callable[[], bool],
    waits: Callable[[], bool],
    limit: float,
    least: float,
) -> None:
    destroyed = []

    class Store:
        def check(self, keys: list[str]) -> bool:
            assert keys == ["left/1", "left/2"]
            return left()

    monkeypatch.setattr(peers, "LAST_WAIT", limit)
    monkeypatch.setattr(peers, "_get_default_store", Store)
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 3)):
        monkeypatch.setattr(peers.dist, name, lambda value=value: value)
    monkeypatch.setattr(peers.dist, "destroy_process_group", lambda: destroyed.append(True))
    started = time.monotonic()
    peers.stop_distributed(waits)
    assert least <= time.monotonic() - started < 30 and destroyed


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (["a/0", "a/1", "b/0", "b/1"], None),
        (["a/0"], None),
        (["a/0", "a/1", "a/0", "a/1"], "a has 2 for 4 ranks."),
        (["a/0", "a/1", "b/0", "b/0", "c/0", "c/0", "c/0"], "b has 1 for 2 ranks, c has 1 for 3 ranks."),
    ],
)
def test_ranks_that_would_share_a_gpu_are_refused_alike_on_all_of_them(
    monkeypatch: pytest.MonkeyPatch, places: list[str], told: str | None
) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(peers, "_get_default_store", lambda: store)
    monkeypatch.setattr(peers.dist, "get_world_size", lambda: len(places))
    with ThreadPoolExecutor(len(places)) as pool:
        ranks = threading.local()
        monkeypatch.setattr(peers.dist, "get_rank", lambda: ranks.own)

        def join(rank: int) -> str:
            ranks.own = rank
            try:
                peers.refuse_shared_gpus(*places[rank].split("/"))
            except RecipeError as error:
                return str(error)
            return ""

        messages = set(pool.map(join, range(len(places))))
    (message,) = messages
    assert told in message and "world.processes" in message if told else message == ""


GLOO = "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20869"


def test_a_lost_connection_is_told_from_a_rank_s_own_failure() -> None:
    assert lost_another(RuntimeError(GLOO)) and not lost_another(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("words", [GLOO, "shapes do not match"])
def test_a_first_rank_that_is_gone_ends_the_others_with_75(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def broadcast(answer: list[object], src: int) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(peers.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(peers.dist, "broadcast_object_list", broadcast)
    with pytest.raises(RankLost if words == GLOO else RuntimeError) as error:
        decided_by_first(lambda: 1)
    assert getattr(error.value, "exit_code", None) == (ExitCode.REQUEUE if words == GLOO else None)
