"""The three stages: they run, resume exactly, write files that the package reads, and keep their gradients apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gear_engine import Pipeline
from gear_engine.checkpoint import load_generator, load_tokenizer
from gear_engine.errors import ConfigError, NumericalError, ResumeMismatchError
from gear_engine.training import InitConfig, Trainer
from gear_engine.training.data import batches
from gear_engine.training.logs import read_log
from gear_engine.training.modules import frozen
from gear_engine.training.steps import _generator_update, _pixels, _target, _tokenizer_loss
from tests.training.tiny import config, source

STAGES = ("tokenizer", "joint", "generator")
#: Lines of the log without their timings.
TIMES = {"images_per_second"}


def losses(records: list) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records if record is not None]


def train(settings, resume: bool = False, until: int | None = None) -> tuple[Trainer, list[dict]]:
    trainer = Trainer(settings, source(settings), resume=resume, device="cpu")
    return trainer, losses(list(trainer.run(until)))


@pytest.fixture(scope="module")
def stage0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tokenizer stage."""
    folder = tmp_path_factory.mktemp("stage0")
    trainer, _ = train(config("tokenizer", folder))
    return folder / "checkpoints" / f"{trainer.step:07d}.pt"


def started(stage: str, folder: Path, stage0: Path, **changes):
    init = InitConfig() if stage == "tokenizer" else InitConfig(tokenizer=str(stage0))
    return config(stage, folder, init=init, **changes)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_stops_goes_on_to_the_same_losses(stage: str, tmp_path: Path, stage0: Path) -> None:
    whole, expected = train(started(stage, tmp_path / "whole", stage0))
    broken = started(stage, tmp_path / "broken", stage0)
    # Step 3 is after the checkpoint of step 2: it is trained twice.
    _, first = train(broken, until=3)
    resumed, rest = train(broken, resume=True)
    assert resumed.step == whole.step == 6
    assert first == expected[:3] and rest == expected[2:]
    assert losses(read_log(tmp_path / "broken" / "log.jsonl")) == losses(read_log(tmp_path / "whole" / "log.jsonl"))
    for name in ("tokenizer", "tokenizer_ema", "generator", "generator_ema", "discriminator", "projectors"):
        a, b = getattr(whole.state, name), getattr(resumed.state, name)
        if a is not None:
            assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", ["vq", "ibq", "lfq"])
def test_joint_checkpoints_sample(family: str, tmp_path: Path) -> None:
    trainer, records = train(config("joint", tmp_path, family, steps=3))
    assert {"ce_loss", "proj_loss_ar", "proj_loss_vq", "codebook_usage", "d_loss"} <= records[-1].keys()
    path = tmp_path / "checkpoints" / "0000003.pt"
    stored = torch.load(path, weights_only=True)
    official = {"ar", "ema", "projectors", "vq", "vq_ema", "discriminator", "args", "steps"}
    official |= {f"{kind}_{name}" for kind in ("opt", "sched") for name in ("ar", "vq", "disc")}
    assert set(stored) == official | {"encoder", "resume"} and stored["steps"] == 3
    generator, tokenizer = load_generator(path), load_tokenizer(path)
    assert generator.config == trainer.state.generator.config
    assert tokenizer.config == trainer.state.tokenizer.config
    assert torch.equal(generator.output.weight, trainer.state.generator_ema.output.weight)
    out = Pipeline.from_pretrained(str(path))(class_labels=[0, 2], seeds=[1, 2])
    assert out.images[0].size == (8, 8) and out.tokens.shape == (2, 16)


def test_a_generator_stage_names_its_tokenizer(tmp_path: Path, stage0: Path) -> None:
    trainer, _ = train(started("generator", tmp_path, stage0, steps=2))
    path = tmp_path / "checkpoints" / "0000002.pt"
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {"ar", "ema", "projectors", "opt", "sched", "args", "steps", "encoder", "resume"}
    tokenizer = load_tokenizer(path)
    averaged = torch.load(stage0, weights_only=True)["vq_ema"]
    assert all(torch.equal(value, averaged[name]) for name, value in tokenizer.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in trainer.state.tokenizer.state_dict().items())


def joint_state(**changes):
    settings = config("joint", **changes)
    trainer = Trainer(settings, source(settings), device="cpu", write=False)
    list(trainer.run(3))  # past the zeros of the output head and of the warm-up's first step
    batch = next(iter(batches(trainer.source, settings, trainer.world, 3, 4)))
    return trainer.state, batch


@pytest.mark.parametrize("branch", ["soft", "straight_through"])
def test_no_gradient_crosses(branch: str) -> None:
    """The tokenizer's total gives the generator, its projector and the discriminator none; theirs give it none."""
    state, batch = joint_state(alignment={"branch": branch})
    images, target = _pixels(state, batch), _target(state, batch)
    output = state.passes["vq"](images, state.generator.tok_embeddings.weight.detach())
    total, _ = _tokenizer_loss(state, images, output)
    _, projected = frozen(state.passes["ar"], batch.labels, embedded=output.soft, tap_only=True)
    alignment = -torch.nn.functional.cosine_similarity(projected, target, dim=-1).mean()
    (total + alignment).backward()
    others = [*state.generator.parameters(), *state.projectors.parameters(), *state.discriminator.parameters()]
    assert all(parameter.grad is None for parameter in others)
    assert all(parameter.grad is not None for parameter in state.tokenizer.parameters())
    # The alignment alone reaches the encoder, and in the VQ family the codebook, never the decoder.
    for parameter in state.tokenizer.parameters():
        parameter.grad = None
    output = state.passes["vq"](images, state.generator.tok_embeddings.weight.detach())
    _, projected = frozen(state.passes["ar"], batch.labels, embedded=output.soft, tap_only=True)
    (-torch.nn.functional.cosine_similarity(projected, target, dim=-1).mean()).backward()
    assert all(parameter.grad is None for parameter in state.tokenizer.decoder.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in state.tokenizer.encoder.parameters())
    assert state.tokenizer.quantize.embedding.weight.grad.abs().sum() > 0
    for parameter in state.tokenizer.parameters():
        parameter.grad = None
    # The hard branch is integers: whatever it trains, the tokenizer has no part in.
    _generator_update(state, batch, output.indices, target)
    assert not output.indices.is_floating_point()
    assert all(parameter.grad is None for parameter in state.tokenizer.parameters())


def test_only_what_a_stage_trains_moves(tmp_path: Path, stage0: Path) -> None:
    settings = started("generator", tmp_path, stage0)
    trainer = Trainer(settings, source(settings), device="cpu", write=False)
    before = {name: value.clone() for name, value in trainer.state.tokenizer.state_dict().items()}
    list(trainer.run(3))
    assert all(torch.equal(before[name], value) for name, value in trainer.state.tokenizer.state_dict().items())
    assert trainer.state.tokenizer_ema is trainer.state.tokenizer


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    settings = config("tokenizer", tmp_path)
    train(settings, until=2)
    with pytest.raises(ResumeMismatchError, match="resume it"):
        train(settings)
    with pytest.raises(ResumeMismatchError, match=r"optimizer\.tokenizer_lr"):
        train(config("tokenizer", tmp_path, optimizer={"tokenizer_lr": 0.5}), resume=True)
    other = dataclasses.replace(source(settings, 20))
    with pytest.raises(ResumeMismatchError, match="other images"):
        Trainer(settings, other, resume=True, device="cpu")
    longer, _ = train(settings.replace(steps=8), resume=True)
    assert longer.step == 8
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["0000004.pt", "0000006.pt", "0000008.pt"]


def test_numbers_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    settings = config("tokenizer", tmp_path, optimizer={"tokenizer_lr": 1e30, "warmup_steps": 0})
    with pytest.raises(NumericalError, match=r"is (nan|inf|-inf) at step"):
        train(settings)
    assert not (tmp_path / "checkpoints").exists() or torch.load(
        sorted((tmp_path / "checkpoints").iterdir())[-1], weights_only=True
    )
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == "tokenizer"


def test_a_tokenizer_of_another_shape_is_refused(tmp_path: Path, stage0: Path) -> None:
    with pytest.raises(ConfigError, match="codebook_size"):
        train(started("joint", tmp_path, stage0, tokenizer={"codebook_size": 32}))


def test_precision_schedule_and_adaptive_weight() -> None:
    changes = {"loss": {"adaptive": True}, "alignment": {"spatial_norm": "zscore"}, "optimizer": {"schedule": "cosine"}}
    settings = config("joint", steps=3, precision="bf16", **changes)
    trainer = Trainer(settings, source(settings), device="cpu", write=False)
    records = losses(list(trainer.run()))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.state.generator.parameters())
    assert [record["lr_ar"] for record in records] == pytest.approx([1e-4, 0.55e-4, 1e-5])
    assert records[-1]["gan_weight"] not in (0.0, 0.1) and records[-1]["vq_total"] < 10
