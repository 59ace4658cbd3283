"""The drop-in functions on the official modules themselves, where a checkout of the official code is at hand.

``GEAR_OFFICIAL`` and ``LLAMAGEN_OFFICIAL`` name the checkouts (GEAR's needs einops). Each runs in a process of its own:
both have top-level packages with everyday names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

PROLOGUE = """
import sys, torch
sys.path.insert(0, {checkout!r})
import gear_engine.compat as ours
torch.set_grad_enabled(False)

def randomise(model):
    torch.manual_seed(0)
    model.output.weight.normal_(std=2 * model.config.dim ** -0.5)
    return model.eval()

def check(official, own, batch_settings):
    for settings in batch_settings:
        torch.manual_seed(5)
        expected = official(**settings)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        tokens = own(**settings)
        assert tokens.dtype == expected.dtype and torch.equal(tokens, expected), settings
        assert torch.equal(torch.get_rng_state(), state)

SETTINGS = [
    dict(),
    dict(cfg_scale=4.0, top_k=100),
    dict(cfg_scale=2.0, cfg_interval=6, top_p=0.9, temperature=0.9),
    dict(cfg_scale=1.5, sample_logits=False),
]
"""

GEAR_CLASS = """
from models.llamagen import ModelArgs, Transformer
from models.generate import generate
model = randomise(Transformer(ModelArgs(dim=256, n_layer=3, n_head=4, vocab_size=1024, block_size=64)))
labels = torch.tensor([3, 999, 0])
check(lambda **s: generate(model, labels, 64, **s), lambda **s: ours.generate(model, labels, 64, **s), SETTINGS)
assert model.layers[0].attention.kv_cache is not None  # the official sampler's cache, which ours leaves alone
"""

GEAR_TEXT = """
from models.llamagen_t2i import ModelArgs, Transformer
from models.generate_t2i import generate_t2i
for text_attn in ("causal", "prefix"):
    model = randomise(Transformer(ModelArgs(
        dim=288, n_layer=3, n_head=4, vocab_size=1024, block_size=64, cls_token_num=20, caption_dim=48,
        text_attn=text_attn)))
    states, uncond = torch.randn(3, 20, 48), torch.randn(1, 20, 48).expand(3, -1, -1)
    mask, empty = torch.ones(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    mask[0, 5:] = 0
    mask[1, :12] = 0
    for masks in ((mask, empty), (mask, mask), (None, None)):
        check(
            lambda **s: generate_t2i(model, states, uncond, 64, *masks, **s),
            lambda **s: ours.generate_t2i(model, states, uncond, 64, *masks, **s),
            SETTINGS,
        )
"""

GEAR_TOKENIZERS = """
from models import Tokenizers
for name in ("VQ-16", "VQ-8", "IBQ-16", "LFQ-16", "LFQ-8", "GLFQ-16"):
    torch.manual_seed(0)
    vq = Tokenizers[name]().eval()
    quant, _, info, *_ = vq.encode(torch.rand(1, 3, 64, 32) * 2 - 1)
    expected = vq.decode_code(info[2], list(quant.shape))
    images = ours.decode_code(vq, info[2], list(quant.shape))
    error = ((images - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-5, (name, error)
"""

LLAMAGEN = """
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.generate import generate
common = dict(dim=256, n_layer=3, n_head=4, vocab_size=1024, block_size=64)
model = randomise(Transformer(ModelArgs(**common)))
labels = torch.tensor([3, 999])
check(lambda **s: generate(model, labels, 64, **s), lambda **s: ours.generate(model, labels, 64, **s), SETTINGS)
model = randomise(Transformer(ModelArgs(**common, model_type="t2i", cls_token_num=120, caption_dim=40)))
states, mask = torch.randn(3, 120, 40), torch.zeros(3, 120, dtype=torch.long)
mask[0, 100:], mask[1, 119:], mask[2, :] = 1, 1, 1
states = states * mask[:, :, None]
for masks in (mask, None):
    check(
        lambda **s: generate(model, states, 64, masks, **s),
        lambda **s: ours.generate(model, states, 64, masks, **s),
        SETTINGS,
    )
from tokenizer.tokenizer_image.vq_model import VQ_models
vq = VQ_models["VQ-16"]().eval()
codes = torch.randint(0, 16384, (2, 12))
expected = vq.decode_code(codes, [2, 8, 3, 4])
images = ours.decode_code(vq, codes, [2, 8, 3, 4])
assert ((images - expected).abs().max() / expected.abs().max()).item() <= 1e-5
"""

CAPTIONS = """
import random, warnings
from language.t5 import T5Embedder
from gear_engine.caption_cleaning import clean_caption
warnings.filterwarnings("ignore")
official = T5Embedder.__new__(T5Embedder)
official.use_text_preprocessing = True
random.seed(0)
pieces = ["A Porsche 356", "http://foo.com/bar", "www:abc", "foo.ru/x-y_z/", "me@foo.org", " ", "  ", "&amp;", "&quot;",
    "%20", "+", "<person>", "<b>bold</b>", "#123", "#12345", "1234567", "127.0.0.1", "10:30 ", "img_01.png", "don't",
    "--", "...", "..", ". ", ".", ",", ":", " : ", "(a)", "[b]", "{c}", "|", "/", "*", "~", "ab123", "a1b", "1a2",
    "free shipping", "download free", "click for more", "jpg image", "page 12", "3x4", "'", "_", "-", "@nick", "x",
    "co", "12a3b4c", "&lt;i&gt;", chr(34), chr(92), chr(9), chr(0xC3) + chr(0xA9)]
pieces += [chr(code) for code in (0x201C, 0x201D, 0x2019, 0x6F22, 0x3231, 0xD7, 0x445, 0x2014, 0x2026, 0xAE)]
for _ in range(3000):
    text = "".join(random.choice(pieces) + random.choice(["", " "]) for _ in range(random.randint(0, 9)))
    assert official.text_preprocessing(text) == clean_caption(text), text
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "program"),
    [
        pytest.param("GEAR_OFFICIAL", GEAR_CLASS, id="gear-class"),
        pytest.param("GEAR_OFFICIAL", GEAR_TEXT, id="gear-text"),
        pytest.param("GEAR_OFFICIAL", GEAR_TOKENIZERS, id="gear-tokenizers"),
        pytest.param("LLAMAGEN_OFFICIAL", LLAMAGEN, id="llamagen"),
        pytest.param("LLAMAGEN_OFFICIAL", CAPTIONS, id="llamagen-captions"),
    ],
)
def test_official_modules(variable: str, program: str) -> None:
    checkout = os.environ.get(variable)
    if not checkout:
        pytest.skip(f"set {variable} to a checkout of the official code")
    source = PROLOGUE.replace("{checkout!r}", repr(checkout)) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
