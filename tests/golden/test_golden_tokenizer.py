"""Parity with the published tokenizers, their GAN decoder and group-wise LFQ."""

import pytest
import torch
from golden_files import Golden, golden_files

from models.tokenizer import GroupLFQ, TokenizerConfig, tokenizer_from_state

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.mark.parametrize("golden", golden_files("tokenizer_") + golden_files("tokenizer_gan_"))
def test_tokenizer(golden: Golden) -> None:
    config = TokenizerConfig.from_json(golden.config)
    tokenizer = tokenizer_from_state(config, golden.group("param."))
    raw, bits = golden.tensor("out.pre_sign"), golden.tensor("out.bits")

    torch.testing.assert_close(tokenizer.encode_raw(golden.tensor("in.image")), raw, **TOLERANCE)
    sure = raw.abs() > 1e-4
    assert torch.equal(tokenizer.encode(golden.tensor("in.image"))[sure], bits[sure])

    noise = golden.tensor("noise.decoder") if config.gan_decoder else None
    torch.testing.assert_close(tokenizer.decode(bits, noise), golden.tensor("out.decoded"), **TOLERANCE)


@pytest.mark.parametrize("golden", golden_files("tokenizer_gan_"))
def test_gan_decoder_draws_the_published_noise(golden: Golden) -> None:
    tokenizer = tokenizer_from_state(TokenizerConfig.from_json(golden.config), golden.group("param."))
    torch.manual_seed(golden.config["decoder_seed"])
    decoded = tokenizer.decode(golden.tensor("out.bits"))
    torch.testing.assert_close(decoded, golden.tensor("out.decoded"), **TOLERANCE)


@pytest.mark.parametrize("golden", golden_files("group_lfq_"))
def test_group_lfq(golden: Golden) -> None:
    config = golden.config
    quantizer = GroupLFQ(config["dim"], config["groups"], config["temperature"], config["eps"])
    z = golden.tensor("in.z").requires_grad_()
    out = quantizer(z)

    assert torch.equal(out.bits, golden.tensor("out.bits"))
    assert torch.equal(out.indices, golden.tensor("out.indices"))
    for name in ("entropy_loss", "per_sample_entropy", "codebook_entropy", "commitment"):
        torch.testing.assert_close(getattr(out, name), golden.tensor(f"out.{name}"), **TOLERANCE)
    (gradient,) = torch.autograd.grad(out.entropy_loss, z)
    torch.testing.assert_close(gradient, golden.tensor("out.entropy_loss_grad_z"), **TOLERANCE)
