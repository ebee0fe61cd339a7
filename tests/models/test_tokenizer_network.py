"""The tokenizer's arithmetic against a plain one, its shapes, and what it says to inputs that do not fit."""

import plain_tokenizer as plain
import pytest
import torch

from models.tokenizer import (
    TOKENIZER_PRESETS,
    BinaryTokenizer,
    TokenizerConfig,
    binarize,
    to_uint8,
)


def tiny(**changes: object) -> TokenizerConfig:
    sizes: dict[str, object] = {"ch": 32, "ch_mult": (1, 2, 1), "z_channels": 6, "num_res_blocks": 1}
    return TokenizerConfig(**(sizes | changes))  # type: ignore[arg-type]


def random_tokenizer(config: TokenizerConfig) -> BinaryTokenizer:
    """All parameters away from their initial values, so that none can be ignored unseen."""
    torch.manual_seed(0)
    tokenizer = BinaryTokenizer(config).requires_grad_(False)
    for parameter in tokenizer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return tokenizer


@pytest.mark.parametrize("gan", [False, True])
def test_network_agrees_with_the_plain_definition(gan: bool) -> None:
    tokenizer = random_tokenizer(tiny(gan_decoder=gan)).double()
    params = {name: value.numpy() for name, value in tokenizer.state_dict().items()}
    image = torch.rand(1, 3, 8, 12, dtype=torch.float64) * 2 - 1
    raw = tokenizer.encode_raw(image)
    assert torch.allclose(
        raw[0], torch.from_numpy(plain.encode_raw(params, image[0].numpy(), 3, 1)), atol=1e-9
    )

    bits = tokenizer.encode(image)
    noise = torch.randn_like(bits) if gan else None
    expected = plain.decode(params, bits[0].numpy(), 3, 1, noise[0].numpy() if noise is not None else None)
    assert torch.allclose(tokenizer.decode(bits, noise)[0], torch.from_numpy(expected), atol=1e-9)


def test_bits_are_signs_and_zero_is_minus_one() -> None:
    values = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])
    assert binarize(values).tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0]
    assert binarize(values.bfloat16()).dtype == torch.bfloat16


def test_any_size_that_fits_and_a_batch_changes_nothing() -> None:
    tokenizer = random_tokenizer(tiny())
    images = [torch.rand(3, *size) for size in ((8, 8), (16, 4), (8, 8), (8, 8), (16, 4))]
    together = tokenizer.encode_all(images, batch_size=2)
    for image, bits in zip(images, together, strict=True):
        assert bits.shape == (6, image.shape[1] // 4, image.shape[2] // 4)
        assert torch.equal(bits, tokenizer.encode(image[None])[0])
    assert tokenizer.decode(together[1][None]).shape == (1, 3, 16, 4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 10), "8x10 pixels .* multiples of 4"),
        ((1, 3, 0, 8), "0x8 pixels"),
        ((3, 8, 8), r"expected \[batch, 3, rows, columns\]"),
        ((1, 1, 8, 8), r"shape \[1, 1, 8, 8\]"),
    ],
)
def test_pictures_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_tokenizer(tiny()).encode(torch.zeros(shape))


def test_requests_that_are_no_pictures() -> None:
    tokenizer, pixels = random_tokenizer(tiny()), torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"a picture of torch.uint8, expected floats in \[-1, 1\]"):
        tokenizer.encode(pixels[None])
    for batch_size in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}, expected a whole number"):
            tokenizer.encode_all([pixels / 127.5 - 1], batch_size)  # type: ignore[arg-type]


def test_a_picture_of_another_dtype_than_the_weights_or_with_no_numbers() -> None:
    tokenizer, picture = random_tokenizer(tiny()), torch.zeros(1, 3, 8, 8)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"picture of {dtype}, but .* weights are torch\.float32"):
            tokenizer.encode(picture.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(picture.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"torch\.float64"):
            tokenizer.encode(picture.double())
    for value in (float("nan"), float("inf")):
        picture[0, 1, 2, 3:5] = value
        with pytest.raises(ValueError, match=r"2 values that are NaN or infinite, expected .* \[-1, 1\]"):
            tokenizer.encode(picture)


def test_bits_that_do_not_fit() -> None:
    plain_decoder, gan = random_tokenizer(tiny()), random_tokenizer(tiny(gan_decoder=True))
    bits = torch.ones(1, 6, 2, 2)
    with pytest.raises(ValueError, match=r"expected \[batch, 6, rows, columns\]"):
        plain_decoder.decode(bits[:, :5])
    with pytest.raises(ValueError, match=r"bits of torch.int8, expected floats"):
        plain_decoder.decode(bits.to(torch.int8))
    with pytest.raises(ValueError, match="a grid of 1x1 tokens, expected at least two tokens"):
        plain_decoder.decode(bits[:, :, :1, :1])
    with pytest.raises(ValueError, match="a grid of 0x2 tokens"):
        plain_decoder.decode(torch.ones(1, 6, 0, 2))
    with pytest.raises(ValueError, match="bits are a list, expected a float tensor"):
        plain_decoder.decode(bits.tolist())
    with pytest.raises(ValueError, match="a picture is a list, expected a float tensor"):
        plain_decoder.encode([[0.0]])
    with pytest.raises(ValueError, match="no GAN decoder"):
        plain_decoder.decode(bits, torch.zeros_like(bits))
    with pytest.raises(ValueError, match="that of the bits"):
        gan.decode(bits, torch.zeros(1, 6, 2, 1))


def test_the_gan_decoder_draws_its_noise_once() -> None:
    gan, bits = random_tokenizer(tiny(gan_decoder=True)), torch.ones(2, 6, 2, 3)
    torch.manual_seed(5)
    drawn = gan.decode(bits)
    torch.manual_seed(5)
    assert torch.equal(drawn, gan.decode(bits, torch.randn(2, 6, 2, 3)))


def test_pixels_are_truncated_after_clamping() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 0.0078, 0.0079, 1.0, 9.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 129, 255, 255]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch": 48}, "multiples of 32"),
        ({"ch": 0}, "ch is 0"),
        ({"ch_mult": ()}, "one positive integer per level"),
        ({"double_z": True}, "double_z"),
        ({"double_z": None}, "double_z = None, expected false"),
        ({"gan_decoder": 1}, "gan_decoder = 1, expected true or false"),
        ({"ch_mult": None}, "ch_mult = None, expected one positive integer per level"),
        ({"num_res_blocks": 0, "z_channels": -1}, "z_channels is -1.*num_res_blocks is 0"),
    ],
)
def test_impossible_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_config_json_round_trip_and_its_mistakes() -> None:
    config = tiny(gan_decoder=True)
    assert TokenizerConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"`ch_mult` is missing, `attn` is unknown"):
        TokenizerConfig.from_json({"ddconfig": {"ch": 32, "z_channels": 4, "num_res_blocks": 1, "attn": []}})
    with pytest.raises(ValueError, match="no `ddconfig`"):
        TokenizerConfig.from_json({"ch": 32})
    published = config.to_json()
    published["ddconfig"]["resolution"] = 256
    assert TokenizerConfig.from_json(published) == config


def expected_parameters(config: TokenizerConfig) -> int:
    """Counted from the description, term by term."""
    w, n, bits = [config.ch * m for m in config.ch_mult], config.num_res_blocks, config.z_channels

    def block(a: int, b: int) -> int:
        return 2 * a + 9 * a * b + 2 * b + 9 * b * b + (a * b if a != b else 0)

    def level(a: int, b: int) -> int:
        return block(a, b) + (n - 1) * block(b, b)

    encoder = 27 * config.ch + n * block(w[-1], w[-1]) + 2 * w[-1] + w[-1] * bits + bits
    encoder += sum(level(a, b) for a, b in zip([config.ch, *w], w, strict=False))
    encoder += sum(9 * a * a + a for a in w[:-1])
    decoder = 9 * bits * (1 + config.gan_decoder) * w[-1] + w[-1] + n * block(w[-1], w[-1])
    decoder += sum(level(a, b) + 2 * (bits * a + a) for a, b in zip([*w[1:], w[-1]], w, strict=True))
    decoder += sum(9 * a * 4 * a + 4 * a for a in w[1:]) + 2 * w[0] + 27 * w[0] + 3
    return encoder + decoder


def count(config: TokenizerConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in BinaryTokenizer(config).parameters())


@pytest.mark.parametrize("gan", [False, True])
def test_parameters_of_the_published_tokenizers(gan: bool) -> None:
    d16 = TOKENIZER_PRESETS["ae_d16c32"].config(gan_decoder=gan)
    assert (d16.downsample, d16.z_channels) == (16, 32)
    assert count(d16) == expected_parameters(d16)
    for name, bits in (("ae_d32c128", 128), ("ae_d32c256", 256)):
        d32 = TOKENIZER_PRESETS[name].config(ch_mult=(1, 1, 1, 2, 2, 3), gan_decoder=gan)
        assert (d32.downsample, d32.z_channels) == (32, bits)
        assert count(d32) == expected_parameters(d32)


def test_presets_do_not_invent_what_is_not_published() -> None:
    with pytest.raises(ValueError, match=r"ae_config\.json"):
        TOKENIZER_PRESETS["ae_d32c128"].config()
    with pytest.raises(ValueError, match="6 factors"):
        TOKENIZER_PRESETS["ae_d32c256"].config(ch_mult=(1, 1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"expected \[1, 1, 2, 2, 4\]"):
        TOKENIZER_PRESETS["ae_d16c32"].config(ch_mult=(1, 1, 2, 2, 2))
