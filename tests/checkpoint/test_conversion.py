"""Converted folders: bit-equal, whole or not there, opened by the load functions, and read without a network."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.checkpoint import (
    checkpoint_args,
    checkpoint_hash,
    checkpoint_parts,
    convert,
    load_generator,
    load_pair,
    load_tokenizer,
    offline_child,
    read_generator,
    save_pretrained,
)
from gear_engine.checkpoint.safetensors_file import write_safetensors
from gear_engine.cli import convert as command
from gear_engine.errors import CheckpointError, UnsafeCheckpointError
from gear_engine.models.transformer import Transformer
from tests.checkpoint import files
from tests.checkpoint.files import GENERATOR, HEADS, IBQ, LFQ, TEXT, VQ
from tests.checkpoint.mutations import disturb, flip
from tests.checkpoint.test_refusals import Payload


@pytest.fixture
def stage1(tmp_path: Path) -> Path:
    return files.save(tmp_path / "stage1.pt", files.stage1())


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


def test_save_pretrained_and_damage(stage1: Path, tmp_path: Path) -> None:
    pair, folder = load_pair(stage1, **HEADS), tmp_path / "saved"
    save_pretrained(folder, pair.generator, pair.tokenizer)
    assert files.equal(load_tokenizer(folder).state_dict(), files.tokenizer_state())
    digest = checkpoint_hash(folder)
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(folder, pair.generator)
    weights = folder / "generator.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert checkpoint_hash(folder) != digest
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_generator(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        load_tokenizer(folder)
    with pytest.raises(CheckpointError, match="nothing to save"):
        save_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"generator": None},
        {"generator": {"config": {"dim": 47}}},
        {"generator": {"config": {"dim": 48, "unknown": 1}}},
        {"generator": []},
        {"generator": {"config": {"dim": "48", "n_layer": [], "n_head": None}}},
    ],
)
def test_a_wrong_description(stage1: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "saved"
    save_pretrained(folder, load_generator(stage1, **HEADS))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError):
        load_generator(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError):
        load_generator(folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "match"),
    [
        ("generator", "n_layer", 10**9, "n_layer: config.json says 1000000000, but generator.safetensors says 3"),
        ("generator", "dim", 10**6, "dim: config.json says 1000000, but generator.safetensors says 48"),
        ("generator", "num_classes", 8, "has_uncond_class: config.json says True"),
        ("generator", "vocab_size", 10**30, "out of every range"),
        ("tokenizer", "ch_mult", [1, 4], "ch_mult"),
        ("tokenizer", "num_res_blocks", 10**9, "num_res_blocks"),
        ("tokenizer", "codebook_embed_dim", 10**12, "out of every range"),
        ("tokenizer", "codebook_embed_dim", "x", "not possible"),
    ],
)
def test_a_description_of_other_weights(
    stage1: Path, tmp_path: Path, part: str, field: str, value: Any, match: str
) -> None:
    folder = tmp_path / "saved"
    pair = load_pair(stage1, **HEADS)
    save_pretrained(folder, pair.generator, pair.tokenizer)
    description = json.loads((folder / "config.json").read_text())
    description[part]["config"][field] = value
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=match):
        load_pair(folder)


def test_many_mutated_descriptions(stage1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_pretrained(folder, load_generator(stage1, **HEADS))
    path = folder / "config.json"
    text, rng, loaded = path.read_bytes(), random.Random(0), 0
    for index in range(400):
        path.write_bytes(flip(rng, text) if index % 2 else disturb(rng, text))
        try:
            config, state, _ = read_generator(folder)
        except CheckpointError:
            continue
        loaded += 1
        assert files.generator_shapes(config) == files.generator_shapes(GENERATOR)
        assert files.equal(state, files.generator_state())
    assert 0 < loaded < 300


def test_folder_overrides_must_agree(stage1: Path, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "saved", load_generator(stage1, **HEADS))
    assert load_generator(tmp_path / "saved", n_head=4, image_size=64).config == GENERATOR
    with pytest.raises(CheckpointError, match=r"config\.json says 4.*your n_head says 2"):
        load_generator(tmp_path / "saved", n_head=2)


def test_our_safetensors_are_the_librarys(tmp_path: Path) -> None:
    import safetensors.torch

    state = {**files.generator_state(), "half": torch.randn(3, 5).half(), "strided": torch.randn(4, 6).t()}
    write_safetensors(tmp_path / "x.safetensors", state, {"format": "pt"})
    assert files.equal(safetensors.torch.load_file(tmp_path / "x.safetensors"), state)


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
