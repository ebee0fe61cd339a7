"""The benchmark's plain sampling draws the same bits: it compares one thing with itself."""

import pytest
import tiny_models as cases
import torch
from tiny_text_to_image import tiny_model, tiny_tokens

from benchmarks.plain_sampling import plain_class_conditional, plain_text_to_image
from models.class_conditional import sample
from models.flow_settings import FlowSettings


@pytest.mark.parametrize("images", [1, 2])
def test_text_to_image(images: int) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    prompts = [tokens.prompt([33, 44, 55, 66, 77]), tokens.unconditional_prompt()]
    torch.manual_seed(5)
    bits = model.generate(*prompts, 4, 6, tokens=tokens, num_images=images, flow=FlowSettings(3.0, 5))
    torch.manual_seed(5)
    assert torch.equal(plain_text_to_image(model, prompts, (4, 6), tokens, images, 3.0, 5), bits)
    assert 0.1 < (bits > 0).float().mean() < 0.9


@pytest.mark.parametrize("parallel_num", [4, 16])
def test_class_conditional(parallel_num: int) -> None:
    model, labels = cases.class_conditional(parallel_num), torch.arange(3)
    torch.manual_seed(5)
    bits = sample(model, labels, 4.0, steps=5)
    torch.manual_seed(5)
    assert torch.equal(plain_class_conditional(model, labels, 4.0, 5), bits)
    assert 0.1 < (bits > 0).float().mean() < 0.9
