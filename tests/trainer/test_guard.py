import json
import math

from trainer.guard import Guard
from trainer.recipe import GuardSection


def filled(window: int = 8, rewind_after: int = 2) -> Guard:
    guard = Guard(GuardSection(window=window, rewind_after=rewind_after))
    for step in range(window):
        guard.taken(1.0 + 0.1 * (step % 2), 2.0)
    return guard


def test_not_finite_is_refused_from_the_first_step_on() -> None:
    guard = Guard(GuardSection())
    assert "loss is nan" in (guard.verdict(math.nan, 1.0) or "")
    assert "gradient norm is inf" in (guard.verdict(1.0, math.inf) or "")
    assert guard.verdict(1e9, 1e9) is None


def test_outlier_is_refused_once_the_window_is_full() -> None:
    guard = filled()
    limit = 1.05 + 6 * 0.05
    assert guard.verdict(limit - 1e-6, 2.0) is None
    assert "above" in (guard.verdict(limit + 1e-6, 2.0) or "")
    assert guard.verdict(0.0, 0.0) is None  # a fall is welcome


def test_steady_values_do_not_make_noise_an_outlier() -> None:
    guard = filled()
    assert guard.verdict(1.0, 2.0 * 1.05) is None
    assert guard.verdict(1.0, 2.0 * 1.07) is not None


def test_rewind_after_so_many_in_a_row_only() -> None:
    guard = filled()
    guard.skipped()
    guard.taken(1.0, 2.0)
    guard.skipped()
    assert not guard.wants_rewind
    guard.skipped()
    assert guard.wants_rewind


def test_state_survives_json_to_the_bit() -> None:
    guard = filled()
    guard.taken(1 / 3, 0.1 + 0.2)
    again = Guard(guard.section)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    assert again.verdict(1.6, 2.0) == guard.verdict(1.6, 2.0)
