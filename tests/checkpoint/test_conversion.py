"""Converted folders: bit-equal, whole or not there, opened by the load functions, and read without a network."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.checkpoint import (
    checkpoint_args,
    checkpoint_parts,
    conversion,
    convert,
    load_generator,
    load_pair,
    load_tokenizer,
    offline_child,
    read_generator,
)
from gear_engine.cli import convert as command
from gear_engine.errors import CheckpointError, UnsafeCheckpointError
from gear_engine.models.transformer import Transformer
from tests.checkpoint import files
from tests.checkpoint.files import GENERATOR, HEADS, IBQ, LFQ, TEXT, VQ
from tests.checkpoint.refusals import Payload


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions without the new interpreter, which takes seconds: for tests of what is written."""

    def run(job: dict[str, Any]) -> dict[str, Any]:
        return {**conversion.run_job(json.loads(json.dumps(job))), "network": "guarded"}

    monkeypatch.setattr(conversion, "_run_offline", run)


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["convert", *arguments]))


def test_the_command(stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert run_command(str(stage1), str(folder), "--n-head", "4", "--no-ema") == 0
    said = capsys.readouterr().out
    assert "live weights from ar" in said and "bit-equal" in said
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generator.safetensors",
        "tokenizer.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]  # No scratch is left.
    source, converted = load_pair(stage1, ema=False, **HEADS), load_pair(folder, ema=False)
    assert converted.generator.config == source.generator.config == GENERATOR
    assert converted.tokenizer.config == VQ
    assert files.equal(converted.generator.state_dict(), files.generator_state(shift=1.0))
    assert files.equal(converted.tokenizer.state_dict(), files.tokenizer_state(shift=1.0))
    with pytest.raises(CheckpointError, match="not empty"):
        run_command(str(stage1), str(folder), "--n-head", "4")
    assert run_command(str(stage1), str(folder), "--n-head", "4", "--force", "--generator-only") == 0
    assert checkpoint_parts(folder) == ["generator"]
    with pytest.raises(CheckpointError, match="EMA weights and holds no live ones"):
        read_generator(folder, ema=False)


@pytest.mark.usefixtures("in_this_process")
def test_dtypes_and_the_text_encoders_name_survive(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in files.generator_state(TEXT).items()}
    args = {"text_encoder": "Qwen/Qwen3-1.7B", "text_max_len": 5, "cls_token_num": 5, "data_dir": "/secret"}
    path = files.save(tmp_path / "text.pt", {"ema": state, "args": args})
    convert(path, tmp_path / "out", generator_only=True, generator_overrides=HEADS)
    assert files.equal(load_generator(tmp_path / "out").state_dict(), state)
    assert checkpoint_args(path) == args
    assert checkpoint_args(tmp_path / "out") == {"text_encoder": "Qwen/Qwen3-1.7B", "text_max_len": 5}
    assert "secret" not in (tmp_path / "out" / "config.json").read_text()


def test_the_child_has_no_network(tmp_path: Path) -> None:
    code = f"""
import runpy, socket, json
child = runpy.run_path({offline_child.__file__!r})
mode = child["leave_network"]()
interfaces = open("/proc/net/dev").read().splitlines()[2:]
try:
    socket.create_connection(("127.0.0.1", 9), 1); reached = "connected"
except BaseException as error:
    reached = type(error).__name__
print(json.dumps([mode, [line.split(":")[0].strip() for line in interfaces], reached]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    mode, interfaces, reached = json.loads(done.stdout)
    assert reached == "PermissionError"
    assert mode in ("none", "guarded")
    if mode == "none":
        assert set(interfaces) <= {"lo", "sit0", "tunl0", "ip6tnl0"}


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    bad = files.save(tmp_path / "bad.pt", files.stage1(extra=Payload(sentinel)))
    with pytest.raises(UnsafeCheckpointError, match="nothing was run"):
        convert(bad, tmp_path / "deep" / "out")
    assert not sentinel.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(bad, tmp_path / "file")


@pytest.mark.parametrize("options", [{"generator_only": True}, {"tokenizer": "stage1.pt"}])
def test_a_tokenizer_has_no_generator_to_convert(stage1: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    source = files.save(tmp_path / "vq.pt", {"vq": files.tokenizer_state()})
    options = {name: stage1 if name == "tokenizer" else value for name, value in options.items()}
    with pytest.raises(CheckpointError, match="holds a tokenizer but no generator"):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_no_fault_of_the_checkpoint(stage1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "from gear_engine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "convert", str(stage1), str(folder), "--n-head", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "space" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["stage1.pt"]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", ["class", "causal", "prefix", "llamagen"])
def test_a_converted_folder_samples_the_same_tokens(tmp_path: Path, kind: str) -> None:
    """Also what is in no weight, the text attention, comes with the folder."""
    from gear_engine.engine import Engine
    from gear_engine.models.condition import TextCondition
    from gear_engine.request import SamplingParams

    config, given = GENERATOR, dict(HEADS)
    condition: Any = [1, 6, 3]
    if kind != "class":
        config = TEXT.replace(text_attn="causal" if kind == "llamagen" else kind)
        states, null = torch.randn(3, 5, 20), torch.randn(5, 20)
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
        condition = TextCondition(states, mask, null)
    if kind == "llamagen":
        config = config.replace(n_double_stream_layers=0, learned_uncond=True)
        condition = TextCondition(states, mask)
        path = files.save(tmp_path / "text.pt", {"model": files.generator_state(config)})
        given |= {"image_size": 8, "downsample_ratio": 2}
    else:
        args = {**files.ARGS, "cls_token_num": config.cls_token_num, "text_attn": config.text_attn}
        state, live = files.generator_state(config), files.generator_state(config, shift=1.0)
        path = files.save(tmp_path / "stage2.pt", files.stage2(ar=live, ema=state, args=args))
    convert(path, tmp_path / "out", generator_only=True, generator_overrides=given)
    params = SamplingParams(cfg_scale=2.0, top_k=30)

    def tokens(generator: Transformer) -> torch.Tensor:
        return Engine(generator, max_images=2).generate(condition, params, seeds=[5, 6, 7])

    converted = load_generator(tmp_path / "out")
    assert converted.config == config
    expected = tokens(load_generator(path, **given))
    assert expected.shape == (3, GENERATOR.block_size)
    assert expected.unique().numel() > 1
    assert torch.equal(tokens(converted), expected)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["vq", "vq not normalised", "ibq", "lfq", "glfq"])
def test_a_converted_tokenizer_decodes_alike(tmp_path: Path, name: str) -> None:
    """Also what is in no weight, groups of bits and normalised codes, comes with the folder."""
    glfq = LFQ.replace(num_codebooks=3)
    config, given = {
        "vq": (VQ, {}),
        "vq not normalised": (VQ.replace(codebook_l2_norm=False), {"codebook_l2_norm": False}),
        "ibq": (IBQ, {}),
        "lfq": (LFQ, {}),
        "glfq": (glfq, {"num_codebooks": 3}),
    }[name]
    path = files.save(tmp_path / "tokenizer.pt", {"vq": files.tokenizer_state(config)})
    convert(path, tmp_path / "out", tokenizer_overrides=given)
    source, converted = load_tokenizer(path, **given), load_tokenizer(tmp_path / "out")
    assert converted.config == source.config == config
    codes = torch.randint(0, source.quantize.num_codes, (1, 3, 2, config.num_codebooks)).squeeze(-1)
    with torch.no_grad():
        assert torch.equal(converted.decode_code(codes), source.decode_code(codes))
        image = torch.rand(1, 3, 3 * config.downsample, 2 * config.downsample) * 2 - 1
        assert torch.equal(converted.encode(image)[2][2], source.encode(image)[2][2])
