"""Tokenizers: shapes, refusals, gradients, and views of a user's own module."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from gear_engine.config import TOKENIZER_PRESETS, TokenizerConfig
from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.tokenizers import Tokenizer, build_tokenizer, from_module, infer_config, resize, soft_readout, to_uint8

#: Small networks of every family: 5 levels (IBQ has attention in the fifth), one block per level.
SMALL = {
    "vq": TokenizerConfig(family="vq", ch=64, num_res_blocks=1, codebook_size=50, z_channels=24),
    "vq8": TokenizerConfig(family="vq", ch=64, ch_mult=(1, 2, 2, 1), downsample=8, codebook_size=50, z_channels=24),
    "ibq": TokenizerConfig(
        family="ibq", ch=64, num_res_blocks=1, codebook_size=37, codebook_embed_dim=12, codebook_l2_norm=False
    ),
    "lfq": TokenizerConfig(
        family="lfq", ch=64, num_res_blocks=1, codebook_size=2**6, codebook_embed_dim=6, z_channels=6,
        codebook_l2_norm=False,
    ),
    "lfq8": TokenizerConfig(
        family="lfq", ch=64, num_res_blocks=1, codebook_size=2**6, codebook_embed_dim=6, z_channels=6, downsample=8,
        codebook_l2_norm=False,
    ),
    "glfq": TokenizerConfig(
        family="lfq", ch=64, num_res_blocks=1, codebook_size=2**20, codebook_embed_dim=20, z_channels=20,
        num_codebooks=4, codebook_l2_norm=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(SMALL))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    torch.manual_seed(1)
    return build_tokenizer(SMALL[request.param])


def _codes(tokenizer: Tokenizer, batch: int, height: int, width: int) -> torch.Tensor:
    quantize = tokenizer.quantize
    return torch.randint(0, quantize.num_codes, (batch, height, width, quantize.num_codebooks)).squeeze(-1)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 32), (3, 48, 16), (2, 32, 32)])
def test_any_divisible_size_round_trips(tokenizer: Tokenizer, batch: int, height: int, width: int) -> None:
    images = torch.rand(batch, 3, height, width) * 2 - 1
    quant, _, (_, _, indices) = tokenizer.encode(images)
    shape = tokenizer.latent_shape(batch, height, width)
    assert tuple(quant.shape) == shape
    decoded = tokenizer.decode_code(indices, shape)
    assert decoded.shape == images.shape
    # Decoding the codes is decoding the quantized latent, up to the rounding of the straight-through sum.
    torch.testing.assert_close(decoded, tokenizer.decode(quant), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_codes_in_every_accepted_form(tokenizer: Tokenizer) -> None:
    codes = _codes(tokenizer, 2, 3, 3)
    shape = (2, tokenizer.config.codebook_embed_dim, 3, 3)
    expected = tokenizer.decode_code(codes.reshape(-1), shape)
    flat = codes.reshape(2, 9, *codes.shape[3:])
    for same in (
        tokenizer.decode_code(codes),
        tokenizer.decode_code(flat),
        tokenizer.decode_code(codes.int(), shape),
        tokenizer.decode_code(codes, (2, 3, 3, shape[1]), channel_first=False),
    ):
        assert torch.equal(same, expected)


def test_bad_codes_are_refused_before_the_decoder_runs(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("the decoder ran")

    monkeypatch.setattr(tokenizer.decoder, "forward", never)
    codes = _codes(tokenizer, 1, 2, 2)
    shape = (1, tokenizer.config.codebook_embed_dim, 2, 2)
    for wrong in (codes - 2**20 - 1, codes + tokenizer.quantize.num_codes):
        with pytest.raises(InvalidRequestError, match="must lie in"):
            tokenizer.decode_code(wrong, shape)
    with pytest.raises(InvalidRequestError, match="integers"):
        tokenizer.decode_code(codes.float(), shape)
    with pytest.raises(InvalidRequestError, match="do not fill"):
        tokenizer.decode_code(codes, (1, shape[1], 2, 3))
    with pytest.raises(InvalidRequestError, match="do not fill"):
        tokenizer.decode_code(codes, (1, shape[1] + 1, 2, 2))
    with pytest.raises(InvalidRequestError, match="four entries"):
        tokenizer.decode_code(codes, (4, shape[1]))
    with pytest.raises(InvalidRequestError):
        tokenizer.decode_code(codes.reshape(-1))


def test_bad_images_are_refused(tokenizer: Tokenizer) -> None:
    edge = tokenizer.config.downsample
    with pytest.raises(ConfigError, match="multiple"):
        tokenizer.encode(torch.zeros(1, 3, edge + 1, edge))
    for shape in ((3, edge, edge), (1, 4, edge, edge), (0, 3, edge, edge)):
        with pytest.raises(InvalidRequestError):
            tokenizer.encode(torch.zeros(shape))
    with pytest.raises(InvalidRequestError):
        tokenizer.encode(torch.zeros(1, 3, edge, edge, dtype=torch.uint8))


def test_one_by_one_latents(tokenizer: Tokenizer) -> None:
    edge = tokenizer.config.downsample
    image = torch.zeros(1, 3, edge, edge)
    if tokenizer.config.family == "lfq":
        with pytest.raises(ConfigError, match="1 x 1"):
            tokenizer.encode(image)
        with pytest.raises(ConfigError, match="1 x 1"):
            tokenizer.decode(torch.ones(1, tokenizer.config.codebook_embed_dim, 1, 1))
    else:
        with torch.no_grad():
            assert tokenizer(image)[0].isfinite().all()


def test_training_mode_reaches_every_parameter(tokenizer: Tokenizer) -> None:
    tokenizer.train()
    try:
        images, (vq_loss, commit_loss, entropy, usage) = tokenizer(torch.rand(2, 3, 32, 32))
        loss = images.square().mean() + sum(part for part in (vq_loss, commit_loss, *entropy) if part is not None)
        loss.backward()
        assert usage == 0
        for name, parameter in tokenizer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    finally:
        tokenizer.zero_grad()
        tokenizer.eval()


def test_soft_readout_sends_gradients_to_the_encoder(tokenizer: Tokenizer) -> None:
    *_, distance = tokenizer.encode(torch.rand(1, 3, 32, 32), return_distance=True)
    readout = soft_readout(distance, torch.randn(distance.shape[1], 5), 0.3)
    readout.square().sum().backward()
    gradient = tokenizer.encoder.conv_in.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    tokenizer.zero_grad()
    with pytest.raises(InvalidRequestError, match="tau"):
        soft_readout(distance, torch.randn(distance.shape[1], 5), 0.0)
    with pytest.raises(InvalidRequestError, match="do not fit"):
        soft_readout(distance, torch.randn(distance.shape[1] + 1, 5), 1.0)


@torch.no_grad()
def test_large_batches_are_quantized_in_blocks_alike(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(2, tokenizer.config.codebook_embed_dim, 5, 7)
    expected = tokenizer.quantize(z)[2][2]
    monkeypatch.setattr("gear_engine.ops.codebook_quantize._BLOCK_ROWS", 9)
    assert torch.equal(tokenizer.quantize(z)[2][2], expected)
    assert torch.equal(tokenizer.quantize(z, return_distance=True)[2][2], expected)


class Official(nn.Module):
    """A stand-in for a user's module: the official keys, none of our code in the way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        for name, child in tokenizer.named_children():
            self.add_module(name, child)


@torch.no_grad()
def test_a_view_shares_the_weights_however_they_change() -> None:
    for config in SMALL.values():
        owner = build_tokenizer(config)
        user = Official(owner).train()
        view = from_module(user)
        assert view.config == config
        assert user.training
        assert not view.training
        codes = _codes(view, 1, 2, 2)
        shape = (1, config.codebook_embed_dim, 2, 2)
        weight = owner.decoder.conv_out.weight
        for change in (lambda w: w.data.copy_(w * 2), lambda w: setattr(w, "data", w.data * 3)):
            before = view.decode_code(codes, shape)
            change(weight)
            after = view.decode_code(codes, shape)
            assert not torch.equal(before, after)
            assert torch.equal(after, owner.eval().decode_code(codes, shape))


def test_a_view_unwraps_compiled_and_keeps_nothing_alive() -> None:
    user = Official(build_tokenizer(SMALL["vq"]))
    view = from_module(torch.compile(user))
    assert view.config == SMALL["vq"]
    gone = weakref.ref(user)
    del user
    gc.collect()
    torch._dynamo.reset()
    assert gone() is None


def test_a_strange_module_is_no_tokenizer() -> None:
    with pytest.raises(ConfigError, match="not the weights"):
        from_module(nn.Linear(3, 3))
    tokenizer = build_tokenizer(SMALL["ibq"])
    tokenizer.decoder.conv_out = nn.Conv2d(32, 4, 3)
    with pytest.raises(ConfigError, match=r"decoder\.conv_out\.bias is \(4,\), expected \(3,\)"):
        from_module(tokenizer)


def test_published_configurations_follow_from_shapes() -> None:
    for name, config in TOKENIZER_PRESETS.items():
        with torch.device("meta"):
            tokenizer = Tokenizer(config)
        shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
        assert infer_config(shapes) == config, name


@pytest.mark.parametrize("bits", [8, 14, 18, 20, 24, 32])
def test_modules_and_files_agree_on_the_groups_of_bits(bits: int) -> None:
    """A latent of 20 bits is one index whether it comes from a file or from a module."""
    from gear_engine.checkpoint.infer_tokenizer import TokenizerOverrides, infer_tokenizer
    from gear_engine.checkpoint.stored import StorageRef, StoredTensor, contiguous_stride

    config = SMALL["lfq"].replace(
        codebook_embed_dim=bits, z_channels=bits, codebook_size=2**bits, num_codebooks=4 if bits == 32 else 1
    )
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    stored = {
        key: StoredTensor(StorageRef("0", torch.float32, 0), torch.float32, 0, shape, contiguous_stride(shape))
        for key, shape in shapes.items()
    }
    assert infer_config(shapes) == config
    assert infer_tokenizer(stored, {}, TokenizerOverrides()) == config


def test_pixels_are_truncated_not_rounded() -> None:
    x = torch.tensor([-2.0, -1.0, -1.0 + 1.99 / 127.5, 0.0, 0.999, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_uint8(x).flatten().tolist() == [0, 0, 2, 128, 255, 255, 255]
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    assert to_uint8(x.bfloat16())[0, 0, 3, 0] == 128


def test_resize_is_bicubic_and_may_overshoot() -> None:
    x = (torch.rand(1, 3, 8, 8) > 0.5) * 2.0 - 1.0
    assert resize(x, 8) is x
    assert torch.equal(resize(x, (16, 12)), F.interpolate(x, size=(16, 12), mode="bicubic"))
    assert resize(x, 16).max() > 1
    with pytest.raises(InvalidRequestError):
        resize(x, 0)
