"""How long rank 0 waits for the others before it leaves, and what they make of its death."""

import time
from collections.abc import Callable

import pytest

from foundation.errors import ExitCode
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
