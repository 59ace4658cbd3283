"""What a GPU does when memory runs out, weights move, another device is current; and torch's own draws there.

Without a GPU all of this is skipped.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gear_engine.engine import Engine
from gear_engine.errors import OutOfMemoryError
from gear_engine.models.transformer import Transformer
from gear_engine.ops import GeneratorOps
from gear_engine.request import ImageRequest, SamplingParams
from gear_engine.sampler import TorchNoise
from tests.gpu.test_engine_on_gpu import GPU, SETTINGS, backend
from tests.models_for_tests import CLASS, fresh_model, small_model

__all__ = ["backend"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its memory is what is tested"),
]

P = SamplingParams
IMAGES = 192
#: Logits of two rows per image take 25 MB: more than what torch's allocator may have left in a segment of its own.
WIDE = CLASS.replace(vocab_size=16384)
MIB = 2**20


@contextlib.contextmanager
def _room(nbytes: int) -> Iterator[None]:
    """No more than ``nbytes`` can be allocated on the device beyond what is allocated now."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(GPU) + nbytes) / total), GPU)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def _wide(backend: str, **options: Any) -> Engine:
    return Engine(small_model(WIDE).weights().to(GPU), max_images=IMAGES, max_new_tokens=3, backend=backend, **options)


def _rollout(engine: Engine) -> torch.Tensor:
    labels = [image % 10 for image in range(IMAGES)]
    return engine.generate(labels, P(cfg_scale=3.0, top_k=50)).cpu()


@pytest.mark.parametrize("execution", ["direct", "eager", "graph"])
def test_out_of_memory_during_a_rollout(backend: str, execution: Any) -> None:
    """A typed error; nothing is in flight, and with memory the same engine draws what it should."""
    expected = _rollout(_wide(backend, execution=execution))
    engine = _wide(backend, execution=execution)
    with _room(0), pytest.raises(OutOfMemoryError, match="lower max_images"):
        _rollout(engine)
    assert engine.num_unfinished == 0
    assert torch.equal(_rollout(engine), expected)


def test_out_of_memory_during_warm_up(backend: str) -> None:
    """With more and more room, so that the first warm-up, a later one, or a capture is what does not fit."""
    expected, failures = _rollout(_wide(backend, execution="graph")), 0
    for room in (0, 32, 96, 1024):
        engine = _wide(backend, execution="graph")
        steps: Any = engine._steps
        stream = torch.cuda.current_stream(GPU)
        with _room(room * MIB):
            try:
                engine.warm_up()
            except OutOfMemoryError:
                failures += 1
        assert torch.cuda.current_stream(GPU) == stream
        assert steps._launched == int(steps._buffers.counter)
        assert torch.equal(_rollout(engine), expected), f"after {room} MiB"
        if steps.num_programs == 2 * len(_buckets(engine)):
            break
    assert failures > 0
    engine.warm_up()
    assert steps.num_programs == 2 * len(_buckets(engine))


def _buckets(engine: Engine) -> tuple[int, ...]:
    from gear_engine.segments import buckets

    return buckets(2 * engine.max_images)


def test_requests_in_flight_go_on_after_running_out(backend: str) -> None:
    """The step that failed is repeated."""
    expected = _rollout(_wide(backend, execution="eager"))
    engine = _wide(backend, execution="eager")
    for image in range(IMAGES):
        engine.add_request(ImageRequest(label=image % 10, seed=image, params=P(cfg_scale=3.0, top_k=50)))
    engine.step()
    with _room(0), pytest.raises(OutOfMemoryError):
        engine.step()
    done = []
    while engine.num_unfinished:
        done += engine.step()
    done.sort(key=lambda image: image.request_id)
    assert torch.equal(torch.stack([image.tokens for image in done]).cpu(), expected)


def _copy(model: Transformer) -> Transformer:
    other = Transformer(model.config).to(GPU).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_moved_weights_are_captured_anew(backend: str) -> None:
    """All graphs of the old weights die, and the new ones are captured into the same pool of memory."""
    model = fresh_model().to(GPU)
    engine = Engine(model, max_images=3, execution="graph", backend=backend)
    labels, seeds = [1, 5, 9], [4, 5, 6]
    expected = engine.generate(labels, SETTINGS[2], seeds=seeds)
    engine.warm_up()
    taken = []
    for _ in range(6):
        moved = _copy(model)
        engine.bind(None)
        engine.bind(moved)
        assert torch.equal(engine.generate(labels, SETTINGS[2], seeds=seeds), expected)
        engine.warm_up()
        assert torch.equal(engine.generate(labels, SETTINGS[2], seeds=seeds), expected)
        model = moved
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved(GPU))
    assert taken[-1] <= taken[1], "what the dead graphs held is not given back"
    other = fresh_model().to(GPU)
    other.output.weight.data.mul_(-1)
    engine.bind(other)
    direct = Engine(other, max_images=3, execution="direct", backend=backend)
    assert torch.equal(
        engine.generate(labels, SETTINGS[2], seeds=seeds), direct.generate(labels, SETTINGS[2], seeds=seeds)
    )


@pytest.mark.parametrize(("images", "vocab_size"), [(1, 61), (3, 16384), (5, 1000), (8, 16384), (64, 16384)])
def test_the_noise_is_what_torchs_own_draw_uses(images: int, vocab_size: int) -> None:
    """``multinomial`` of (B, V) against argmax(probs / q), q drawn into the first B rows of a longer buffer: on CUDA
    its values depend on the size of what is drawn at a time."""
    probs = torch.randn(images, vocab_size, device=GPU).mul(3).softmax(dim=-1)
    buffer = torch.full((2 * images + 3, vocab_size), 7.0, device=GPU)
    official, ours = (torch.Generator(GPU).manual_seed(11) for _ in range(2))
    noise, ops = TorchNoise(ours), GeneratorOps.resolve(GPU, torch.float32)
    for _ in range(5):
        expected = torch.multinomial(probs, 1, generator=official)[:, 0]
        noise.fill(ops, buffer[:images], [P()] * images)
        assert torch.equal((probs / buffer[:images]).argmax(dim=-1), expected)
        assert torch.equal(ours.get_state(), official.get_state())
    assert bool((buffer[images:] == 7.0).all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: another one has to be the current device")
@pytest.mark.parametrize("execution", ["direct", "graph"])
def test_an_engine_on_another_device(backend: str, execution: Any) -> None:
    """Events, launches and captures go to the engine's device; the current one stays."""
    expected = Engine(fresh_model(), max_images=2).generate([1, 2, 3], SETTINGS[1])
    with torch.cuda.device(0):
        engine = Engine(fresh_model().to("cuda:1"), max_images=2, execution=execution, backend=backend)
        engine.warm_up()
        tokens = [engine.generate([1, 2, 3], SETTINGS[1]) for _ in range(4)]
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(each, tokens[0]) for each in tokens)
    assert float((tokens[0].cpu() == expected).float().mean()) > 0.9
