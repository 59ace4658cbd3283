"""Decoding by tokenizers that are not ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gear_engine import compat
from gear_engine.config import TokenizerConfig
from gear_engine.errors import ConfigError
from gear_engine.tokenizers import build_tokenizer
from tests.checkpoint.files import IBQ, LFQ, VQ
from tests.compat.foreign import fingerprint


class ForeignTokenizer(nn.Module):
    """A module with the official attribute names around the layers of ours; no decode_code of its own."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        ours = build_tokenizer(config)
        for name, part in ours.named_children():
            if name != "quantize" and not isinstance(part, nn.Identity):
                setattr(self, name, part)
        self.quantize = nn.Module()
        args = {"codebook_embed_dim": config.codebook_embed_dim, "num_res_blocks": config.num_res_blocks}
        if config.family == "lfq":
            args |= {"downsample": config.downsample, "num_codebooks": config.num_codebooks}
            self.quantize.register_buffer("mask", torch.zeros(1), persistent=False)
        else:
            self.quantize.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        mult = "decoder_ch_mult" if config.family == "vq" else "ch_mult"
        self.config = SimpleNamespace(**args, **{mult: list(config.ch_mult)}, z_channels=config.z_channels)
        if config.family == "vq":
            self.quantize.l2_norm = config.codebook_l2_norm
            self.quantize.register_buffer("codebook_used", torch.zeros(4))


TOKENIZERS = {
    "vq": VQ.replace(codebook_size=50, codebook_embed_dim=8, z_channels=32, num_res_blocks=2),
    "ibq": IBQ.replace(codebook_size=50, codebook_embed_dim=12, z_channels=12, num_res_blocks=1),
    "glfq": LFQ.replace(ch_mult=(1, 2), downsample=2, num_codebooks=2),
}


@pytest.mark.parametrize("family", list(TOKENIZERS))
def test_decode_code_of_a_foreign_tokenizer(family: str) -> None:
    config = TOKENIZERS[family]
    torch.manual_seed(0)
    foreign = ForeignTokenizer(config).eval()
    ours = build_tokenizer(config)
    state = {k: v for k, v in foreign.state_dict().items() if k not in ("quantize.codebook_used", "quantize.mask")}
    ours.load_state_dict(state)
    shape = (2, config.codebook_embed_dim, 3, 5)
    high = 8 if family == "glfq" else config.codebook_size
    codes = torch.randint(0, high, (2 * 3 * 5 * config.num_codebooks,))
    before = fingerprint(foreign)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = compat.decode_code(foreign, codes, shape)
    with torch.no_grad():
        assert torch.equal(images, ours.decode_code(codes, shape))
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert torch.equal(compat.decode_code(ours, codes, shape), images)
    assert [row[:-1] for row in before] == [row[:-1] for row in fingerprint(foreign)]
    for parameter in foreign.parameters():
        parameter.data.mul_(1.01)
    assert not torch.equal(compat.decode_code(torch.compile(foreign), codes, shape), images)
    foreign.train()
    with pytest.raises(ConfigError, match="training mode"):
        compat.decode_code(foreign, codes, shape)


def test_foreign_tokenizer_with_an_unknown_part() -> None:
    foreign = ForeignTokenizer(TOKENIZERS["vq"]).eval()
    foreign.extra = nn.Linear(2, 2).eval()
    with pytest.raises(ConfigError, match=r"unknown tensor extra\.weight"):
        compat.decode_code(foreign, torch.zeros(4, dtype=torch.long), (1, 8, 2, 2))
