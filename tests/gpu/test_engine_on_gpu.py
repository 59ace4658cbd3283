"""What can be seen on a GPU only: captured steps against called ones, the goldens, and a hundred rollouts.

Without a GPU all of this is skipped: what ``tests/test_step_program.py`` shows on a CPU is the logic, not the capture.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.errors import BackendUnavailableError, OutOfMemoryError
from gear_engine.models.condition import TextCondition
from gear_engine.models.transformer import Transformer
from gear_engine.ops import GeneratorOps
from gear_engine.request import ImageRequest, SamplingParams
from tests.golden_weights import golden_index, load_golden
from tests.models_for_tests import CLASS, fresh_model
from tests.test_generator_goldens import CLASS as CLASS_GOLDENS
from tests.test_generator_goldens import LLAMAGEN_TEXT, TEXT, golden_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: captured steps need one"),
]

GPU = torch.device("cuda")
P = SamplingParams
SETTINGS = [
    P(),
    P(cfg_scale=4.0, temperature=0.9, top_k=20),
    P(cfg_scale=2.5, cfg_interval=5, top_p=0.9),
    P(sample_logits=False),
    P(cfg_scale=2.0, cfg_interval=0),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        GeneratorOps.resolve(GPU, torch.float32, name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return name


def _model(dtype: torch.dtype = torch.float32) -> Transformer:
    return fresh_model().to(GPU, dtype)


def _condition(golden: dict[str, torch.Tensor]) -> torch.Tensor | TextCondition:
    if "cond_emb" in golden:
        return TextCondition(*(golden[key].to(GPU) for key in ("cond_emb", "cond_mask", "uncond_emb", "uncond_mask")))
    if "emb_masks" in golden:
        return TextCondition(golden["cond"].to(GPU), golden["emb_masks"].to(GPU))
    return golden["cond"].to(GPU)


@pytest.mark.parametrize("name", [*CLASS_GOLDENS, *TEXT, *LLAMAGEN_TEXT])
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_goldens(goldens_dir: Path, name: str, execution: Any, backend: str) -> None:
    """All runs, argmax and sampled. The stored runs were drawn on a CPU: so is the noise here, and copied."""

    def draw(out: torch.Tensor, generator: torch.Generator | None) -> None:
        out.copy_(torch.empty(out.shape).exponential_(1))

    golden = load_golden(goldens_dir, name)
    model = golden_model(goldens_dir, name)
    condition = _condition(golden)
    engine = Engine(model.weights().to(GPU), max_images=len(condition), backend=backend, execution=execution)
    object.__setattr__(engine.ops, "torch_exponential", draw)
    for index, run in enumerate(golden_index(goldens_dir)[name]["runs"]):
        params = P(**{key: value for key, value in run.items() if key != "seed"})
        torch.manual_seed(run["seed"])
        tokens = engine.generate(condition, params, rng="torch")
        assert torch.equal(tokens.cpu(), golden[f"run{index}.tokens"]), params


@pytest.mark.parametrize("images", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_eager_and_direct_are_equal_in_every_bucket(images: int, dtype: torch.dtype, backend: str) -> None:
    model = _model(dtype)
    labels, seeds = [(3 * i + 1) % 10 for i in range(images)], [2**i for i in range(images)]
    for params in (P(cfg_scale=3.0, top_k=30), P(), [SETTINGS[i % len(SETTINGS)] for i in range(images)]):
        drawn = [
            Engine(model, max_images=8, execution=execution, backend=backend).generate(labels, params, seeds=seeds)
            for execution in ("direct", "eager", "graph")
        ]
        assert torch.equal(drawn[1], drawn[2]), "a replay is the function that was captured"
        assert torch.equal(drawn[0], drawn[1]), "a row's bits depend on its bucket"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forty_images_are_those_of_small_batches(dtype: torch.dtype, backend: str) -> None:
    """80 rows with guidance, in a bucket of 128: linear layers in several blocks of rows."""
    model, images = _model(dtype), 40
    labels, seeds, params = [i % 10 for i in range(images)], list(range(images)), P(cfg_scale=3.0, top_k=30)
    many = Engine(model, max_images=images, execution="graph", backend=backend)
    few = Engine(model, max_images=4, execution="graph", backend=backend)
    tokens = many.generate(labels, params, seeds=seeds)
    for first in (0, 20, 36):
        part = slice(first, first + 4)
        assert torch.equal(few.generate(labels[part], params, seeds=seeds[part]), tokens[part])


def test_images_join_and_leave(backend: str) -> None:
    model = _model()
    engine = Engine(model, max_images=3, execution="graph", backend=backend)
    lengths, done, ids = [16, 5, 1, 16, 9, 2, 2, 12], {}, {}
    pending, rng = list(range(8)), random.Random(5)
    while pending or engine.num_unfinished:
        if pending and rng.random() < 0.4:
            i = pending.pop(0)
            params = SETTINGS[i % len(SETTINGS)]
            ids[engine.add_request(ImageRequest(label=i, seed=i, params=params, max_new_tokens=lengths[i]))] = i
        done.update({finished.request_id: finished.tokens for finished in engine.step()})
    alone = Engine(model, max_images=1, execution="graph", backend=backend)
    for request_id, i in ids.items():
        expected = alone.generate([i], SETTINGS[i % len(SETTINGS)], seeds=[i])[0, : lengths[i]]
        assert torch.equal(done[request_id], expected)


def test_a_hundred_rollouts_take_no_more_memory_and_no_new_graph(backend: str) -> None:
    engine = Engine(_model(), max_images=4, execution="graph", backend=backend)
    engine.warm_up()
    engine.warm_up(rng="torch")
    steps: Any = engine._steps
    rng, cost, programs, seen = random.Random(1), engine.capture_cost, steps.num_programs, {}
    for rollout in range(100):
        images = rng.randint(1, 4)
        labels = [rng.randint(0, 9) for _ in range(images)]
        params = [rng.choice(SETTINGS) for _ in range(images)]
        seeds = [rng.randrange(2**40) for _ in range(images)]
        tokens = engine.generate(labels, params, seeds=seeds)
        for row in range(images):
            key = (labels[row], params[row], seeds[row])
            assert torch.equal(engine.generate([key[0]], key[1], seeds=[key[2]])[0], tokens[row])
        if rollout % 3 == 0:
            engine.generate(labels, params, rng="torch", generator=torch.Generator(GPU).manual_seed(rollout))
        if rollout == 10:
            torch.cuda.synchronize()
            seen = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= seen["allocated"]
    assert torch.cuda.memory_reserved() <= seen["reserved"]
    assert (engine.capture_cost, steps.num_programs) == (cost, programs)


def test_out_of_memory_leaves_the_engine_usable(backend: str) -> None:
    engine = Engine(_model(), max_images=2, execution="graph", backend=backend)
    expected = engine.generate([1, 2], SETTINGS[1])
    with pytest.raises(OutOfMemoryError):
        Engine(_model(), max_images=10**7)
    assert torch.equal(engine.generate([1, 2], SETTINGS[1]), expected)


@pytest.mark.usefixtures("without_tf32")
def test_sampled_runs_equal_the_official_code(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same GPU under the same seed, TF32 off."""
    checkout = os.environ.get("GEAR_OFFICIAL")
    if not checkout:
        pytest.skip("GEAR_OFFICIAL names no checkout of the official code")
    monkeypatch.syspath_prepend(checkout)
    try:
        from models.generate import generate  # type: ignore[import-not-found]
        from models.llamagen import ModelArgs  # type: ignore[import-not-found]
        from models.llamagen import Transformer as Official
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("models"):
            raise  # no checkout of the official code
        pytest.skip(f"the official code needs {error.name}")

    args = ModelArgs(
        dim=CLASS.dim, n_layer=CLASS.n_layer, n_head=CLASS.n_head, vocab_size=CLASS.vocab_size,
        block_size=CLASS.block_size, num_classes=CLASS.num_classes, cls_token_num=1,
    )  # fmt: skip
    official = Official(args).to(GPU).eval()
    with torch.no_grad():
        for index, parameter in enumerate(official.parameters()):
            noise = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * (parameter.shape[-1] ** -0.5))
    from gear_engine import compat

    labels = torch.tensor([1, 5, 9], device=GPU)
    for settings in ({}, {"cfg_scale": 4.0, "top_k": 20}, {"cfg_scale": 2.0, "cfg_interval": 6, "top_p": 0.9}):
        torch.manual_seed(7)
        expected = generate(official, labels, CLASS.block_size, **settings)
        torch.manual_seed(7)
        found = compat.generate(official, labels, CLASS.block_size, backend=backend, **settings)
        assert torch.equal(found, expected), settings
    for name in [name for name in sys.modules if name == "models" or name.startswith("models.")]:
        del sys.modules[name]
