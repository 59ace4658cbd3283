"""gear-engine sample as processes: two of them together, and broken off by signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gear_engine.cli.main import main
from tests.cli import tiny

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
#: Enough images that a signal comes in time.
COUNT = 64  # long enough that a signal, once the first image is there, arrives before the last one
STEP = Path("exp") / "step0000007" / "cfg2-temp1"


def flags(checkpoint: Path, output: Path, *more: str, count: int = 5) -> list[str]:
    paths = ["--ckpt-path", str(checkpoint), "--output-dir", str(output), "--device", "cpu", "--cfg-scale", "2"]
    sizes = ["--fid-num", str(count), "--per-proc-batch-size", "2", "--image-size-eval", str(tiny.IMAGE_SIZE)]
    return ["sample", *paths, *sizes, *more]


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "gear_engine.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)


def pixels(output: Path) -> np.ndarray:
    with np.load(output / STEP / "samples.npz") as archive:
        return np.asarray(archive["arr_0"])


def test_two_processes_write_the_images_of_one(checkpoint: Path, tmp_path: Path) -> None:
    assert main(flags(checkpoint, tmp_path / "one")) == 0
    done = launch(flags(checkpoint, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(tmp_path / "one"), pixels(tmp_path / "two"))
    for image in (tmp_path / "one" / STEP / "samples").iterdir():
        assert (tmp_path / "two" / STEP / "samples" / image.name).read_bytes() == image.read_bytes()


def test_two_processes_follow_the_official_order(checkpoint: Path, tmp_path: Path) -> None:
    done = launch(flags(checkpoint, tmp_path, "--rng", "torch", "--seed", "3"))
    assert done.returncode == 0, done.stderr
    found = pixels(tmp_path)
    for rank in (0, 1):
        drawn = tiny.official_run(count=5, batch=2, seed=3, rank=rank, world=2, cfg_scale=2.0)
        for index, (_, image) in drawn.items():
            assert np.abs(found[index].astype(int) - image.astype(int)).max() <= 1, index


def test_a_refusal_in_two_processes_is_short(checkpoint: Path, tmp_path: Path) -> None:
    assert main(flags(checkpoint, tmp_path)) == 0
    done = launch(flags(checkpoint, tmp_path, "--seed", "1"))
    assert done.returncode != 0
    assert "seed = 0, this run asks for 1" in done.stderr
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]


@pytest.mark.parametrize(("number", "status", "rng"), [(signal.SIGINT, 130, "torch"), (signal.SIGTERM, 143, "philox")])
def test_a_signal_leaves_a_folder_that_resumes(
    checkpoint: Path, tmp_path: Path, number: signal.Signals, status: int, rng: str
) -> None:
    arguments = flags(checkpoint, tmp_path / "broken", "--rng", rng, count=COUNT)
    process = subprocess.Popen(
        [sys.executable, "-m", "gear_engine.cli", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs, and so perhaps this test, with SIGINT ignored; a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    samples = tmp_path / "broken" / STEP / "samples"
    deadline = time.monotonic() + 60
    while process.poll() is None and not list(samples.glob("*.png")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == status, shown
    assert "run the same command again" in shown
    assert "Traceback" not in shown
    finished = len(list(samples.glob("*.png")))
    assert 0 < finished < COUNT
    assert not list(samples.glob(".*"))
    assert not (samples.parent / "samples.npz").exists()
    assert main(arguments) == 0
    assert main(flags(checkpoint, tmp_path / "whole", "--rng", rng, count=COUNT)) == 0
    assert np.array_equal(pixels(tmp_path / "broken"), pixels(tmp_path / "whole"))


def test_a_file_size_limit_is_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    arguments = flags(checkpoint, tmp_path, count=5)
    # The PNGs fit, the npz of five 64 x 64 images (61,440 bytes) does not.
    code = (
        "import resource, sys\n"
        "from gear_engine.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / STEP
    assert not (run / "samples.npz").exists()
    assert not list(run.rglob(".*"))
    assert main(arguments) == 0
    assert pixels(tmp_path).shape == (5, 64, 64, 3)
