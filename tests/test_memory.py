"""The memory plan against what is really allocated, and the error that it gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine import memory
from gear_engine.config import GENERATOR_PRESETS, TOKENIZER_PRESETS
from gear_engine.engine import Engine
from gear_engine.errors import OutOfMemoryError
from tests.models_for_tests import CLASS, fresh_model, small_model

CPU = torch.device("cpu")


def test_available_bytes_of_a_cpu() -> None:
    available = memory.available_bytes(CPU)
    assert available is not None
    assert 2**20 < available < 2**50


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of control groups of our own; the process is in /job/step."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("9:cpu,memory:/job/step\n0::/job/step\n")
    return tmp_path


def _limit(folder: Path, limit: str, used: int, *, version: int = 2, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "") if version == 2 else MEMORY_V1
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = f"anon 7\n{names[2]}inactive_file {cached}\n{names[2]}active_file 20\n"
    (folder / "memory.stat").write_text(stat)


MEMORY_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def test_control_group_limits_count(group: Path) -> None:
    _limit(group, "5000", 1000)
    assert memory.available_bytes(CPU) == 4020
    _limit(group, "max", 1000)
    unlimited = memory.available_bytes(CPU)
    assert unlimited is None or unlimited > 5000


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_above_the_process_counts(group: Path, version: int) -> None:
    root = group / "memory" if version == 1 else group
    _limit(root / "job" / "step", str(2**62), 10, version=version)
    _limit(root / "job", "9000", 8000, version=version)
    _limit(root / "another", "50", 40, version=version)
    assert memory.available_bytes(CPU) == 1020


def test_the_cache_of_files_that_were_read_is_not_in_use(group: Path) -> None:
    _limit(group / "job" / "step", "9000", 8000, cached=6000)
    assert memory.available_bytes(CPU) == 7020


def test_arithmetic() -> None:
    plan = {"weights": 3 * 2**30, "nothing": 0, "cache": 2**30}
    memory.check_fits(plan, 4 * 2**30, "hint")
    memory.check_fits(plan, None, "hint")
    message = r"weights 3.00 GiB \+ cache 1.00 GiB = 4.00 GiB, but 3.50 GiB are available; buy more"
    with pytest.raises(OutOfMemoryError, match=message):
        memory.check_fits(plan, 7 * 2**29, "buy more")


def test_plan_holds_what_is_allocated() -> None:
    engine = Engine(small_model(), max_images=3, dtype=torch.float16)
    weights = small_model().weights()
    plan = memory.engine_plan(
        CLASS, num_slots=6, max_tokens=16, dtype=torch.float16, weight_bytes=weights.nbytes_as(torch.float16)
    )
    assert plan["key/value cache"] == engine.cache.kv.untyped_storage().nbytes()
    assert plan["weights"] == engine.weights.nbytes
    assert weights.nbytes_as(torch.float32) == 0


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_plan_of_packed_weights(kind: object) -> None:
    packed = small_model().weights().to(pack_kind=kind)  # type: ignore[arg-type]
    planned = small_model().weights().nbytes_as(torch.float32, kind)  # type: ignore[arg-type]
    shared = {w.data_ptr() for _, w in small_model().weights()._named() if isinstance(w, torch.Tensor)}
    copied = sum(w.nbytes for _, w in packed._named() if not (isinstance(w, torch.Tensor) and w.data_ptr() in shared))
    assert copied == planned


def test_nothing_is_allocated_by_a_plan_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr("gear_engine.engine.StaticKVCache.__init__", fail)
    with pytest.raises(OutOfMemoryError, match="max_images"):
        Engine(small_model(), memory_budget=1000)


class TestImagesThatFit:
    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
    def test_is_the_largest_number_whose_plan_fits(self, cache_dtype: torch.dtype | None, graphs: bool) -> None:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "cache_dtype": cache_dtype, "graphs": graphs}

        def needed(images: int) -> int:
            plan = memory.engine_plan(CLASS, num_slots=2 * images, max_tokens=16, weight_bytes=5000, **options)
            return sum(plan.values())

        for budget in (0, needed(1) - 1, needed(1), 10**6, 10**8):
            fit = memory.images_that_fit(CLASS, budget, weight_bytes=5000, **options)
            assert needed(fit + 1) > budget
            assert fit == 0 or needed(fit) <= budget

    def test_xl_in_80_gigabytes(self) -> None:
        """Smaller entries, shorter images and no graphs leave room for more; a decoder takes some."""
        config = GENERATOR_PRESETS["LlamaGen-XL"]
        budget, bf16 = 80 * 2**30, {"dtype": torch.bfloat16}
        plain = memory.images_that_fit(config, budget, **bf16)  # type: ignore[arg-type]
        assert 150 < plain < 1000
        assert memory.images_that_fit(config, budget, cache_dtype=torch.float8_e4m3fn, **bf16) > 1.4 * plain  # type: ignore[arg-type]
        assert memory.images_that_fit(config, budget, max_tokens=64, **bf16) > 2 * plain  # type: ignore[arg-type]
        assert memory.images_that_fit(config, budget, graphs=True, **bf16) < plain  # type: ignore[arg-type]
        decoder = {"tokenizer": TOKENIZER_PRESETS["VQ-16"], "decode_batch": 64}
        assert memory.images_that_fit(config, budget, **bf16, **decoder) < plain  # type: ignore[arg-type]
        assert memory.images_that_fit(config, 2**20) == 0

    def test_the_engine_says_how_many(self) -> None:
        budget = 2 * 2**20
        fit = memory.images_that_fit(CLASS, budget)
        assert fit > 1
        with pytest.raises(OutOfMemoryError, match=f"GiB are available; {fit} images at a time fit"):
            Engine(small_model(), max_images=fit + 1, memory_budget=budget)
        Engine(small_model(), max_images=fit, memory_budget=budget).generate([1], max_new_tokens=2)


def test_the_decoder_takes_what_is_planned() -> None:
    """Peak memory of a process of its own, above what it had when it began to decode."""
    code = (
        "import torch\n"
        "from gear_engine.config import TOKENIZER_PRESETS\n"
        "from gear_engine.memory import decoder_bytes\n"
        "from gear_engine.tokenizers import build_tokenizer, decoder_fast\n"
        "torch.set_num_threads(1)\n"
        "decoder_fast.unavailable = lambda: 'the modules take more: they decode images together'\n"
        "images, size = 2, 256\n"
        "config = TOKENIZER_PRESETS['VQ-16'].replace(ch=64, num_res_blocks=1)\n"
        "model = build_tokenizer(config).eval()\n"
        "def field(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))\n"
        "quant = torch.zeros(images, 8, 16, 16)\n"
        "with torch.no_grad():\n"
        "    model.decode(quant[:, :, :2, :2])\n"  # what is allocated once, at the first call
        "    before = field('VmRSS')\n"
        "    model.decode(quant)\n"
        "print((field('VmHWM') - before) / decoder_bytes(config, size, size, images, torch.float32))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 1.1


def test_a_budget_holds_for_weights_that_are_bound_later() -> None:
    """Weights of the engine's dtype are read in place; others are a copy, which the plan had no room for."""
    budget = sum(memory.engine_plan(CLASS, num_slots=2, max_tokens=16, dtype=torch.float32, weight_bytes=0).values())
    engine = Engine(small_model(), max_images=1, memory_budget=budget)
    expected = engine.generate([3])
    half = fresh_model().to(torch.bfloat16)
    with pytest.raises(OutOfMemoryError, match="0 images at a time fit, max_images is 1"):
        engine.bind(half)
    engine.bind(small_model())
    assert torch.equal(engine.generate([3]), expected)
    roomy = Engine(small_model(), max_images=1, memory_budget=budget + half.weights().nbytes_as(torch.float32))
    roomy.bind(half)
    roomy.generate([3])
