"""Time and the solver: exact values in float32, and what the SDE does to a known distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.head import HeadConfig, draw_times
from models.head.sampler import integrate
from models.head.schedule import sampling_times, shift


def test_shift_keeps_the_published_association() -> None:
    t = torch.linspace(0.0, 0.95, 101)
    one = np.float32(1.0)
    expected = [0.0, *(one / (one + (one / u - one)) for u in t[1:].numpy())]
    assert shift(t, 1.0).tolist() == [float(u) for u in expected]
    # It is not the identity even at s = 1: that is why the association is kept.
    assert not torch.equal(shift(t, 1.0), t)
    torch.testing.assert_close(shift(t, 1.0), t)
    # A number over a tensor is the tensor's reciprocal times the number in torch: it rounds twice.
    third = np.float32(1.0 / 3.0)
    expected = [0.0, *((one / (third + (one / u - one))) * third for u in t[1:].numpy())]
    assert shift(t, 3.0).tolist() == [float(u) for u in expected]


@given(st.floats(0.2, 5.0), st.integers(1, 60))
def test_times_rise_from_0_and_end_at_1(s: float, steps: int) -> None:
    times = sampling_times(steps, s)
    assert times.times[0] == 0.0 and len(times.times) == len(times.dts) == steps
    assert all(dt > 0 for dt in times.dts)
    assert times.last + times.last_dt == pytest.approx(1.0)
    assert times.times[-1] + times.dts[-1] == pytest.approx(times.last, abs=1e-6)


def test_unshifted_last_step_is_5_hundredths() -> None:
    times = sampling_times(20, 1.0)
    assert (times.last, times.last_dt) == (0.95, 0.05)


def test_training_times_have_their_density() -> None:
    config = HeadConfig(ch_target=1, ch_cond=1, ch_latent=128, depth_latent=2)
    t = draw_times(config, 40_000, torch.Generator().manual_seed(0))
    logit = torch.log(t / (1 - t))
    assert float(logit.mean()) == pytest.approx(-0.8, abs=0.02)
    assert float(logit.std()) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("sampler", ["euler_maruyama", "euler"])
def test_solvers_carry_noise_to_the_data(sampler: str) -> None:
    """Data are -1/+1 with P(+1) = 0.7; the best prediction from x_t is known in closed form."""
    times = sampling_times(200, 1.0)
    at = [*times.times, times.last]

    def expected_data(x: torch.Tensor, index: int) -> torch.Tensor:
        t = at[index]
        log_odds = np.log(0.7 / 0.3) + 2.0 * t * x / (1.0 - t) ** 2
        return torch.tanh(log_odds / 2.0)

    generator = torch.Generator().manual_seed(0)
    shape, device = (20_000, 1, 1), torch.device("cpu")
    x = integrate(expected_data, shape, times, 1.0, sampler, generator, device)  # type: ignore[arg-type]
    assert float((x > 0).float().mean()) == pytest.approx(0.7, abs=0.015)
    assert float((x.abs() - 1.0).abs().mean()) < 0.05
