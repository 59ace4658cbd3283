"""What only a GPU takes, with the driver's library and torch's events played by fakes; hardware has not run it yet."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gear_engine import Engine
from gear_engine.bench import breakdown, inputs, suite_tokenizers, suite_whole_images
from gear_engine.bench.registry import Context, Implementation, select
from gear_engine.bench.sampling import Limits, take_samples
from gear_engine.config import GeneratorConfig
from gear_engine.ops import native
from gear_engine.report import facts, nvml
from gear_engine.report.conditions import ConditionSampler, flags_between
from gear_engine.report.html import report_html
from gear_engine.report.record import Report, validate
from gear_engine.report.table_csv import csv_text
from gear_engine.tokenizers import DeviceDecoder, choose_decoder, to_uint8
from tests.report.conftest import make_record, make_row
from tests.tokenizers.test_tokenizer import SMALL

CUDA = torch.device("cuda", 0)


class _Nvml(types.ModuleType):
    """Enough of nvidia-ml-py for one GPU; ``missing`` names what its driver refuses."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, missing: frozenset[str] = frozenset()) -> None:
        super().__init__("pynvml")
        self.missing = missing
        self.clock, self.power, self.temperature, self.reasons = 1980, 650_000, 61, 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "missing"):
            raise _Nvml.NVMLError("not supported")
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-00000000-1111"
        return uuid

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65.06"

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: str) -> int:
        return 700_000

    def nvmlDeviceGetEccMode(self, gpu: str) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetMigMode(self, gpu: str) -> list[int]:
        return [0, 0]

    def nvmlDeviceGetMaxClockInfo(self, gpu: str, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return {1: self.clock, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return self.power

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        return self.temperature

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return self.reasons


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., _Nvml]]:
    properties = types.SimpleNamespace(
        name="NVIDIA H100", uuid="00000000-1111", major=9, minor=0, multi_processor_count=132,
        total_memory=80 << 30, L2_cache_size=50 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    def install(*missing: str) -> _Nvml:
        fake = _Nvml(frozenset(missing))
        monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
        nvml._handle.cache_clear()
        return fake

    yield install
    nvml._handle.cache_clear()


def test_facts_of_a_gpu(driver: Callable[..., _Nvml]) -> None:
    driver()
    record = make_record([make_row(device_samples=[0.004] * 10)])
    record["device"] = facts.device_facts(CUDA, 2)
    validate(record)
    gpu = record["device"]["gpu"]
    assert (gpu["name"], gpu["multiprocessors"], gpu["memory"]) == ("NVIDIA H100", 132, 80 << 30)
    assert (gpu["driver"], gpu["power_limit_w"], gpu["sm_clock_max_mhz"]) == ("580.65.06", 700.0, 1980)
    assert gpu["ecc"] is True and gpu["mig"] is False and gpu["compute_capability"] == "9.0"
    page = report_html(Report(record))
    assert "132 multiprocessors" in page and "ECC on, MIG off" in page and "wall clock" in page
    line = csv_text(Report(record)).splitlines()
    row = dict(zip(line[0].split(","), line[1].split(","), strict=True))
    assert float(row["median_s"]) == 0.004 and float(row["wall_median_s"]) > 0.01


def test_what_the_driver_refuses_is_unknown_and_not_an_error(driver: Callable[..., _Nvml]) -> None:
    driver("nvmlDeviceGetEccMode", "nvmlDeviceGetMigMode", "nvmlDeviceGetPowerUsage")
    gpu = facts.device_facts(CUDA, 2)["gpu"]
    assert gpu["ecc"] is None and gpu["mig"] is None and gpu["driver"] == "580.65.06"
    assert "power_w" not in nvml.sample(0) and nvml.sample(0)["temperature_c"] == 61
    driver("nvmlInit")
    assert facts.device_facts(CUDA, 2)["gpu"]["driver"] is None and nvml.sample(0) == {}


def test_what_moves_during_a_case_is_flagged(driver: Callable[..., _Nvml], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = driver()
    ticks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    sampler = ConditionSampler(CUDA)
    before = sampler.snapshot()
    sampler.watch()
    quiet = sampler.between(before, sampler.snapshot())
    assert quiet["sm_clock_mhz"] == 1980 and quiet["ranges"]["temperature_c"] == [61, 61] and quiet["throttle"] == []
    assert not [flag for flag in flags_between(quiet, quiet) if "moved" in flag or "throttled" in flag]
    sampler.watch()
    fake.clock, fake.power, fake.temperature, fake.reasons = 1410, 300_000, 82, 0x24
    sampler.watch()
    fake.reasons, fake.clock = 0, 1980  # over when the case ends, and yet it counts
    moved = sampler.between(before, sampler.snapshot())
    record = make_record([make_row()])
    record["conditions"] = [quiet, moved]
    validate(record)
    flags = flags_between(quiet, moved)
    assert "SM clock moved between 1410 and 1980 MHz" in flags
    assert "power moved between 300 and 650 W" in flags
    assert "temperature moved between 61 and 82 °C" in flags
    assert "throttled: power cap" in flags and "throttled: thermal (software)" in flags


class _Event:
    """A device whose clock runs at half of the host's."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.now

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end.at - self.at)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    synchronized: list[torch.device] = []
    _Event.now = 0.0
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr("time.perf_counter", lambda: 2 * _Event.now)
    return synchronized


def _work(index: int) -> None:
    _Event.now += 0.004


def test_device_events_stand_beside_the_wall_clock(events: list[torch.device]) -> None:
    limits = Limits(min_samples=5, max_seconds=0.08)
    (series,) = take_samples([Implementation("cuda", "engine", _work)], copies=1, limits=limits, device=CUDA)
    assert series.device_samples == pytest.approx([0.004] * len(series.device_samples))
    assert series.samples == pytest.approx([0.008] * len(series.device_samples))
    assert series.settled and events and set(events) == {CUDA}


def test_kernels_of_a_gpu_and_the_gap(events: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __init__(self, activities: Any) -> None: ...
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...
        def key_averages(self) -> list[Any]:
            each = types.SimpleNamespace
            return [
                each(key="cudaLaunchKernel", self_device_time_total=0.0, count=70),
                each(key="attention" + "<float>" * 40, self_device_time_total=7_000.0, count=84),
                each(key="linear", self_device_time_total=14_000.0, count=7),
            ]

    monkeypatch.setattr("torch.profiler.profile", Profile)
    linear, attention, gap = breakdown._profiled(lambda: _work(0), CUDA)
    assert (linear["name"], linear["seconds"], linear["calls"]) == ("linear", 0.002, 1)
    assert attention["seconds"] == 0.001 and attention["calls"] == 12 and len(attention["name"]) <= 80
    assert gap == {"name": "gap", "seconds": pytest.approx(0.001), "calls": 0, "bytes": None, "ops": None}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_decoder_benchmark_times_what_a_gpu_decodes_with(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Pixels on the host, of every implementation; the engine's within a step, or 45 dB in bf16."""
    monkeypatch.setattr(
        suite_tokenizers, "choose_decoder", lambda coder, dtype, batch: DeviceDecoder(coder, dtype=dtype, batch=batch)
    )
    monkeypatch.setitem(inputs.TOKENIZER_PRESETS, "VQ-16", SMALL["vq"])
    (case,) = select(["decoder"], "standard", {"tokenizer": ["VQ-16"], "images": ["2"], "dtype": [dtype]}, "pixels=256")
    work = case.benchmark.prepare({**case.params, "pixels": 32}, Context(torch.device("cpu")))
    assert [each.name for each in work.implementations] == ["device", "reference"]
    assert work.check is not None
    expected = work.check.reference(0)
    for each in work.implementations:
        pixels = each.call(0)
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (2, 32, 32, 3))
        assert work.check.error(pixels, expected) <= work.check.bound


@pytest.mark.skipif(native.unavailable("decode_step_cpu") is not None, reason="needs the compiled module")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_whole_images_are_decoded_as_a_pipeline_decodes(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """One decoder, chosen as the pipeline's, for all calls; its pixels are the modules' own within a step."""
    made = []

    def choose(coder: Any, dtype: Any, batch: int) -> Any:
        decoder = DeviceDecoder(coder, batch=batch) if on_gpu else choose_decoder(coder, dtype, batch)
        made.append(decoder)
        return decoder

    monkeypatch.setattr(suite_whole_images, "choose_decoder", choose)
    monkeypatch.setitem(inputs.TOKENIZER_PRESETS, "VQ-16", SMALL["vq"])
    classes, codes = 5, SMALL["vq"].codebook_size
    small = GeneratorConfig(dim=64, n_layer=1, n_head=2, vocab_size=codes, block_size=16, num_classes=classes)
    monkeypatch.setattr(suite_whole_images, "generator_config", lambda model: small)
    drawn: list[torch.Tensor] = []

    class Recording(Engine):
        def generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
            drawn.append(super().generate(*arguments, **options))
            return drawn[-1]

    monkeypatch.setattr(suite_whole_images, "Engine", Recording)
    (case,) = select(["end_to_end"], "standard", {"images": ["3"], "dtype": ["fp32"]}, "")
    edge = 4 * SMALL["vq"].downsample
    work = case.benchmark.prepare({**case.params, "pixels": edge}, Context(torch.device("cpu")))
    for _ in range(2):
        images = work.implementations[0].call(0)
    assert len(made) == 1
    coder = inputs.tokenizer("VQ-16", 0, torch.device("cpu"))
    expected = to_uint8(coder.decode(coder.lookup(drawn[-1].long(), coder.latent_shape(3, edge, edge))))
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    assert tuple(pixels.shape) == (3, edge, edge, 3)
    assert int((pixels.int() - expected.int()).abs().max()) <= 1
    assert [phase["name"] for phase in work.timeline[work.implementations[0].name]()][-1] == "image decoder"
