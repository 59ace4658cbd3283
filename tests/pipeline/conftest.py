"""A tokenizer and a pipeline of small models."""

from __future__ import annotations

import pytest
import torch

from gear_engine.pipeline import Pipeline
from gear_engine.tokenizers import Tokenizer, build_tokenizer
from tests.pipeline.models import TOKENIZER_CONFIG, make_generator


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(TOKENIZER_CONFIG)


@pytest.fixture
def pipe(tokenizer: Tokenizer) -> Pipeline:
    made = Pipeline(make_generator(), tokenizer, max_images=2, decode_batch=2)
    made.set_progress_bar_config(disable=True)
    return made
