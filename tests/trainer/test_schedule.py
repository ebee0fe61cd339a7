import pytest

from trainer.recipe import OptimizerSection
from trainer.schedule import learning_rate


def test_constant_after_linear_warmup() -> None:
    section = OptimizerSection(lr=2.0, warmup_steps=4)
    assert [learning_rate(section, 100, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(section, 100, 99) == 2.0


def test_cosine_ends_at_final_lr() -> None:
    section = OptimizerSection(lr=1.0, schedule="cosine", warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(section, 111, step) for step in range(111)]
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
