"""What the engine computes and keeps, counted through its ops: rows, prompts, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gear_engine import runner
from gear_engine.engine import Engine
from gear_engine.errors import BackendUnavailableError, ConfigError
from gear_engine.kv_cache import StaticKVCache
from gear_engine.request import SamplingParams
from tests.models_for_tests import CLASS, GUIDED, NULL_TEXT, TEXT, captions, small_model

P = SamplingParams


class TestWork:
    """What is computed, counted through the ops."""

    @staticmethod
    def rows_of(engine: Engine, op: str = "decode_attention") -> list[tuple[int, int]]:
        """(rows, output width) of every call of ``op`` from now on."""
        calls: list[tuple[int, int]] = []
        run = getattr(engine.ops, op)

        def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = run(x, *args, **kwargs)
            calls.append((out.shape[0], out.shape[1]))
            return out

        object.__setattr__(engine.ops, op, spy)
        return calls

    def test_unconditional_rows_leave_when_guidance_ends(self) -> None:
        engine = Engine(small_model(), max_images=3, backend="reference")
        calls = self.rows_of(engine)
        before = engine.cache.kv.data_ptr()
        engine.generate([1, 2, 3], P(cfg_scale=2.0, cfg_interval=4), rng="torch", max_new_tokens=10)
        rows = [count for count, _ in calls[:: CLASS.n_layer]]
        # Decode step i draws image token i + 1; steps 0 ... 4 are guided.
        assert rows == [6] * 5 + [3] * 4
        assert engine.cache.kv.data_ptr() == before

    def test_no_guidance_no_unconditional_rows(self) -> None:
        engine = Engine(small_model(), max_images=2, backend="reference")
        calls = self.rows_of(engine)
        engine.generate([1, 2], P(cfg_scale=1.0), max_new_tokens=4)
        assert {count for count, _ in calls} == {2}

    def test_prompts_cost_their_valid_rows_and_only_values(self) -> None:
        engine = Engine(small_model(TEXT), max_images=6, backend="reference")
        calls = self.rows_of(engine, "skinny_linear")
        condition = captions(null=False)
        engine.generate(condition, max_new_tokens=1)
        assert condition.mask is not None
        packed = int(condition.mask.sum() + (~condition.mask[:, -1]).sum())
        assert calls[0] == (packed, TEXT.kv_dim)
        assert all(rows in (packed, 6) for rows, _ in calls)
        assert max(width for _, width in calls[:-1]) < TEXT.qkv_dim

    def test_null_captions_are_computed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoded: list[int] = []

        def spy(weights: Any, ops: Any, rows: Any) -> runner.PrefixState:
            encoded.append(len(rows.valid))
            return runner.encode_prefix(weights, ops, rows)

        monkeypatch.setattr("gear_engine.prefixes.encode_prefix", spy)
        engine = Engine(small_model(TEXT), max_images=6)
        first = engine.generate(captions(), GUIDED, max_new_tokens=3)
        assert encoded == [6, 1]
        again = engine.generate(captions(), GUIDED, max_new_tokens=3)
        assert encoded == [6, 1, 6]
        assert torch.equal(first, again)
        engine.invalidate()
        engine.generate(captions(), GUIDED, max_new_tokens=3)
        assert encoded == [6, 1, 6, 6, 1]
        encoded.clear()
        Engine(small_model(NULL_TEXT), max_images=6).generate(captions(null=False), GUIDED, max_new_tokens=1)
        assert encoded == [6, 6], "a learned null caption takes each caption's mask"

    def test_long_prompts_go_through_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = Engine(small_model(TEXT), max_images=6).generate(captions(), GUIDED)
        monkeypatch.setattr("gear_engine.prefixes.MAX_ROWS", 14)
        assert torch.equal(Engine(small_model(TEXT), max_images=6).generate(captions(), GUIDED), whole)

    def test_the_cache_is_allocated_once(self) -> None:
        engine = Engine(small_model(), max_images=3)
        buffers = engine.cache.kv.data_ptr(), engine.cache.kv.shape
        engine.generate([1, 2, 3], GUIDED)
        engine.generate([4], P())
        assert (engine.cache.kv.data_ptr(), engine.cache.kv.shape) == buffers


class TestFp8Cache:
    """An opt-in: keys and values in 8 bits, other tokens."""

    def test_takes_half_of_a_16_bit_cache(self) -> None:
        sizes = [
            StaticKVCache.nbytes(CLASS.replace(dim=256), 8, 16, dtype)
            for dtype in (torch.bfloat16, torch.float8_e4m3fn)
        ]
        assert sizes[1] / sizes[0] == pytest.approx(0.5 * (1 + 2 / 64))
        engine = Engine(small_model(), cache_dtype=torch.float8_e4m3fn)
        assert engine.cache.dtype == torch.float8_e4m3fn
        assert engine.ops.backends["decode_attention"] == "cpu"
        assert engine.ops.decode_step is not None
        assert engine.ops.decode_steps is not None

    def test_token_agreement_under_equal_noise(self) -> None:
        """Along the exact tokens: how often the draw from the next logits is the same one."""
        labels, seeds = list(range(8)), list(range(8))
        exact = Engine(small_model(), max_images=8, backend="reference").generate(labels, GUIDED, seeds=seeds)
        agreement = {}
        for name, options in (("fp8", {"cache_dtype": torch.float8_e4m3fn}), ("bf16", {"dtype": torch.bfloat16})):
            engine = Engine(small_model(), max_images=8, backend="reference", **options)  # type: ignore[arg-type]
            draw, equal = engine.ops.sample_tokens, []

            def forced(
                logits: torch.Tensor, *args: Any, draw: Any = draw, equal: Any = equal, **kw: Any
            ) -> torch.Tensor:
                drawn, wanted = draw(logits, *args, **kw), exact[:, len(equal)].long()
                equal.append((drawn == wanted).float().mean().item())
                return wanted

            object.__setattr__(engine.ops, "sample_tokens", forced)
            engine.generate(labels, GUIDED, seeds=seeds)
            assert equal[0] == 1.0 or name == "bf16", "the first token needs no cache"
            agreement[name] = sum(equal) / len(equal)
        assert 0.8 < agreement["fp8"] < 1
        assert agreement["bf16"] > 0.8

    def test_equal_tokens_in_any_company(self) -> None:
        options: dict[str, Any] = {"cache_dtype": torch.float8_e4m3fn}
        together = Engine(small_model(), max_images=3, **options).generate([1, 2, 3], GUIDED, seeds=[4, 5, 6])
        eager = Engine(small_model(), max_images=3, execution="eager", **options)
        assert torch.equal(eager.generate([1, 2, 3], GUIDED, seeds=[4, 5, 6]), together)
        assert torch.equal(eager.generate([2], GUIDED, seeds=[5])[0], together[1])

    def test_triton_draws_the_tokens_of_the_reference(self) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        options: dict[str, Any] = {"cache_dtype": "fp8", "max_images": 1}
        drawn = [
            Engine(small_model(), backend={"decode_attention": name}, **options).generate([1], max_new_tokens=4)
            for name in ("triton", "reference")
        ]
        assert torch.equal(*drawn)

    def test_other_dtypes_are_refused(self) -> None:
        for other in (torch.bfloat16, "fp4", "bf16"):
            with pytest.raises(ConfigError, match="cache holds"):
                Engine(small_model(), cache_dtype=other)  # type: ignore[arg-type]

    def test_activations_decide_too(self) -> None:
        """The compiled kernels take no fp16 activations: asked for, they refuse; else the reference runs."""
        options: dict[str, Any] = {"dtype": torch.float16, "cache_dtype": "fp8"}
        with pytest.raises(BackendUnavailableError, match=r"decode_attention.*not float16"):
            Engine(small_model(), backend={"decode_attention": "cpu"}, **options)
        engine = Engine(small_model(), **options)
        assert engine.ops.backends["decode_attention"] == "reference"
        assert engine.generate([1], max_new_tokens=3).shape == (1, 3)
