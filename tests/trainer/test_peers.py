"""How long rank 0 waits for the others before it leaves."""

import time
from collections.abc import Callable

import pytest

from trainer import peers


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
