"""Files, options and models that say different things: both sides are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gear_engine.checkpoint import read_generator, read_tokenizer
from gear_engine.errors import CheckpointError
from tests.checkpoint import files
from tests.checkpoint.files import HEADS, VQ
from tests.checkpoint.refusals import STATE, refused, save


@pytest.mark.parametrize(
    ("args", "given", "match"),
    [
        ({"num_classes": 1000}, {}, r"args\.num_classes says 1000.*8 rows"),
        ({}, {"num_classes": 8000}, r"your num_classes says 8000"),
        ({"codebook_size": 100}, {}, r"tok_embeddings\.weight says 64.*args\.codebook_size says 100"),
        ({}, {"codebook_size": 65}, r"says 64.*your codebook_size says 65"),
        ({"ar_model": "LlamaGen-B"}, {}, r"norm\.weight says 48.*args\.ar_model LlamaGen-B says 768"),
        ({}, {"ar_model": "LlamaGen-XL"}, r"48.*your ar_model LlamaGen-XL says 1280"),
        ({}, {"ar_model": "LlamaGen-Q"}, "no known model"),
        ({}, {"image_size": 384}, r"args\.image_size says 8.*your image_size says 384"),
        ({"image_size": 9}, {}, "not a positive multiple"),
        ({"image_size": "8"}, {}, r"args\.image_size is a str"),
        ({"downsample_ratio": 0}, {}, "not a positive multiple"),
        ({}, {"cls_token_num": 3}, "prefix length"),
    ],
)
def test_contradictions_name_both_sides(tmp_path: Path, args: Any, given: Any, match: str) -> None:
    refused(save(tmp_path, STATE, **args), match, **given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"text_attn": "causal"}, r"args\.text_attn says prefix, but your text_attn says causal"),
        ({"cls_token_num": 300}, r"args\.cls_token_num says 5, but your cls_token_num says 300"),
    ],
)
def test_contradictions_about_text(tmp_path: Path, given: Any, match: str) -> None:
    args = {"cls_token_num": 5, "text_attn": "prefix"}
    refused(save(tmp_path, files.generator_state(files.TEXT), **args), match, **given)
    config = files.TEXT.replace(n_double_stream_layers=0, learned_uncond=True)
    path = save(tmp_path, files.generator_state(config), cls_token_num=120)
    refused(path, r"uncond_embedding says 5, but args\.cls_token_num says 120")


def test_the_head_count_of_an_unpublished_width(tmp_path: Path) -> None:
    path = save(tmp_path, STATE)
    with pytest.raises(CheckpointError, match=r"width 48 .*pass n_head"):
        read_generator(path)
    with pytest.raises(CheckpointError, match="n_head 5 does not divide"):
        read_generator(path, n_head=5)
    with pytest.raises(CheckpointError, match="multiple of 4"):
        read_generator(path, n_head=8)
    with pytest.raises(TypeError):
        read_generator(path, heads=4)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"vq_model": "VQ-16"}, "ch_mult.*VQ-16"),
        ({"vq_model": "VQ-17"}, "not known"),
        ({"codebook_size": 65}, "codebook size.*64.*65"),
        ({"codebook_embed_dim": 8}, "width of a code.*4.*8"),
        ({"downsample_ratio": 16}, "downsample.*2.*16"),
    ],
)
def test_tokenizer_contradictions(tmp_path: Path, given: Any, match: str) -> None:
    path = files.save(tmp_path / "vq.pt", {"model": files.tokenizer_state()})
    with pytest.raises(CheckpointError, match=match):
        read_tokenizer(path, **given)


def test_a_tokenizer_of_another_codebook(tmp_path: Path) -> None:
    from gear_engine.checkpoint import load_pair

    other = files.save(tmp_path / "vq.pt", {"vq": files.tokenizer_state(VQ.replace(codebook_size=32))})
    with pytest.raises(CheckpointError, match=r"vocabulary is 64.*32 codes"):
        load_pair(save(tmp_path, STATE), tokenizer=other, **HEADS)


def test_a_tokenizer_with_several_indices_per_position(tmp_path: Path) -> None:
    """Its 2 ** 6 codes would fit the vocabulary; it is the two indices per position that no generator draws."""
    from gear_engine.checkpoint import load_pair

    grouped = files.save(tmp_path / "glfq.pt", {"vq": files.tokenizer_state(files.LFQ)})
    path = save(tmp_path, STATE)
    assert load_pair(path, tokenizer=grouped, **HEADS).tokenizer.config == files.LFQ
    with pytest.raises(CheckpointError, match="2 indices per position; the generator draws one"):
        load_pair(path, tokenizer=grouped, tokenizer_overrides={"num_codebooks": 2}, **HEADS)
