"""Checkpoints and steps against the official training code, where ``GEAR_OFFICIAL`` names a checkout (needs einops).

The program runs in a process of its own: the checkout has top-level packages with everyday names. Weights that cannot
be had offline are stood in for on both sides: the perceptual distance and the target encoder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_stages import train
from tests.training.tiny import config

PROLOGUE = """
import sys, types, torch
import torch.nn.functional as F
sys.path[:0] = [{checkout!r}, {tests!r}]
from models.llamagen import ModelArgs as ARArgs, Transformer
from models import vq_model, lfq_model, ibq_model

def official_ar(args, sizes):
    return Transformer(ARArgs(**sizes, n_head=args["n_head"], vocab_size=args["codebook_size"],
        block_size=(args["image_size"] // args["downsample_ratio"]) ** 2, num_classes=args["num_classes"],
        multiple_of=16, ffn_dim_multiplier=0.76))

def official_tokenizer(family):
    if family == "vq":
        model = vq_model.VQModel(vq_model.ModelArgs(16, 4, z_channels=8, encoder_ch_mult=[1, 1],
            decoder_ch_mult=[1, 1], entropy_loss_ratio=0.05))
        for part, kind in (("encoder", vq_model.Encoder), ("decoder", vq_model.Decoder)):
            setattr(model, part, kind(ch=32, ch_mult=[1, 1], z_channels=8, num_res_blocks=1))
        return model
    common = dict(ch=32, ch_mult=[1, 1], num_res_blocks=1, codebook_size=16, entropy_loss_ratio=0.05)
    if family == "lfq":
        return lfq_model.LFQModel(lfq_model.LFQModelArgs(codebook_embed_dim=4, z_channels=4, **common))
    return ibq_model.IBQModel(ibq_model.IBQModelArgs(codebook_embed_dim=6, z_channels=6, **common))
"""

LOAD = """
family, path = sys.argv[1:]
stored = torch.load(path, map_location="cpu", weights_only=True)
from gear_engine.checkpoint import load_generator, load_tokenizer
for live, key in ((True, "vq"), (False, "vq_ema")):
    vq = official_tokenizer(family)
    vq.load_state_dict(stored[key], strict=True)
    ours = load_tokenizer(path, ema=not live)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        a, b = vq.eval()(images)[0], ours(images)[0]
    assert (a - b).abs().max() <= 1e-5 * a.abs().max(), (key, (a - b).abs().max())
for live, key in ((True, "ar"), (False, "ema")):
    ar = official_ar(stored["args"], dict(dim=16, n_layer=3))
    ar.load_state_dict(stored[key], strict=True)
    ours = load_generator(path, ema=not live)
    tokens, labels = torch.randint(0, 16, (2, 15)), torch.tensor([0, 3])
    with torch.no_grad():
        a, b = ar.eval()(tokens, labels), ours(tokens, labels)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max(), (key, (a - b).abs().max())
"""

STEPS = """
family, branch = sys.argv[1:]
# What the official losses import and a CPU without network does not have.
for name in ("torchvision", "requests"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision"].models = types.ModuleType("models")
import importlib.util
package = types.ModuleType("official_losses"); package.__path__ = [{checkout!r} + "/src/losses"]
sys.modules["official_losses"] = package
import official_losses.losses as official
from official_losses.discriminator import NLayerDiscriminator, weights_init
from tests.training.test_mathematics import RATE, TOKENIZER_RATE, PatchTargets, pooled
from tests.training.tiny import config, source
from gear_engine.runs.world import World
from gear_engine.training.data import batches
from gear_engine.training import state as states
from gear_engine.training.steps import run_step

class Perceptual(torch.nn.Module):
    def __init__(self, name): super().__init__()
    def forward(self, a, b): return pooled(a, b)
official.PerceptualLoss = Perceptual
official.NLayerDiscriminator = lambda **k: NLayerDiscriminator(input_nc=3, ndf=8, n_layers=1)

class Section(dict):
    __getattr__ = dict.__getitem__
losses = Section(reconstruction_loss="l1", reconstruction_weight=1.0, perceptual_loss="lpips", perceptual_weight=1.0,
    discriminator_start=2, discriminator_factor=1.0, discriminator_weight=0.1, lecam_regularization_weight=0.01,
    lecam_ema_decay=0.999, quantizer_weight=1.0, entropy_weight=1.0)
loss_fn = official.ReconstructionLossVQ(Section(losses=losses))

steps, tau = 8, 0.5
settings = config("joint", family=family, steps=steps, encoder={"kind": "dinov2", "path": "stand-in"},
    loss={"perceptual": "none", "adversarial_start": 2, "lecam_weight": 0.01},
    generator={"dropout": 0.0, "token_dropout": 0.0}, alignment={"tau": tau, "branch": branch},
    optimizer={"generator_lr": RATE, "tokenizer_lr": TOKENIZER_RATE, "discriminator_lr": RATE})
images, targets = source(settings), PatchTargets(torch.float32)
states.Dinov2Targets = lambda *a: targets
state = states.build_state(settings, images, World(), torch.device("cpu"), print)
state.perceptual = pooled
with torch.no_grad():
    state.generator.output.weight.normal_(std=0.02)
vq, ar = official_tokenizer(family), official_ar(dict(n_head=2, codebook_size=16, image_size=8, downsample_ratio=2,
    num_classes=3), dict(dim=16, n_layer=3, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0))
vq.load_state_dict(state.tokenizer.state_dict()); ar.load_state_dict(state.generator.state_dict())
loss_fn.discriminator.load_state_dict(state.discriminator.state_dict())
projector = torch.nn.Sequential(*(torch.nn.Linear(a, b) if a else torch.nn.SiLU()
    for a, b in ((16, 16), (0, 0), (16, 16), (0, 0), (16, 12))))
projector.load_state_dict({k.removeprefix("projs.0."): v for k, v in state.projectors.state_dict().items()})

def adamw(rate, *modules):
    parameters = [p for m in modules for p in m.parameters()]
    return parameters, torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
groups = {"vq": adamw(TOKENIZER_RATE, vq), "disc": adamw(RATE, loss_fn), "ar": adamw(RATE, ar, projector)}
schedules = {k: torch.optim.lr_scheduler.LambdaLR(o, lambda n: float(n >= 1)) for k, (_, o) in groups.items()}

def update(name, total):
    total.backward()
    parameters, optimizer = groups[name]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step(); schedules[name].step(); optimizer.zero_grad(set_to_none=True)
    return norm

def align(hidden, target):
    return -F.cosine_similarity(projector(hidden), target, dim=-1).mean()

worst = {}
for step, batch in enumerate(batches(images, settings, World(), 0, steps)):
    scalars = run_step(state, batch)
    x, target = batch.images.float() / 127.5 - 1.0, targets.targets(batch.images)
    B, K = len(x), 16
    vq.train()
    recon, _, (vq_l, commit_l, ent_l, _), (_, _, indices), d = vq(x, return_distance=True)
    ar.eval()
    for p in [*ar.parameters(), *projector.parameters()]: p.requires_grad = False
    total, logs = loss_fn(x, recon, (vq_l, commit_l, ent_l), step, "generator")
    soft = F.softmax(-d / tau, dim=-1).view(B, -1, K)
    if branch == "straight_through":
        soft = soft + (F.one_hot(indices.view(B, -1), K).float() - soft).detach()
    _, hidden = ar(idx=soft[:, :-1], cond_idx=batch.labels, return_hidden_at=2, early_exit=True)
    proj_vq = align(hidden, target)
    total = total + 1.5 * proj_vq
    norm_vq = update("vq", total)
    d_loss, d_logs = loss_fn(x, recon, (vq_l, commit_l, ent_l), step, "discriminator")
    norm_disc = update("disc", d_loss)
    ar.train()
    for p in [*ar.parameters(), *projector.parameters()]: p.requires_grad = True
    # The official label dropout draws for itself; here it drops what ours dropped.
    ar.cls_embedding.token_drop = lambda labels, force=None: torch.where(batch.drops < 0.1, 3, labels)
    tokens = indices.view(B, -1)
    logits, hidden = ar(idx=tokens[:, :-1], cond_idx=batch.labels, return_hidden_at=2)
    ce, proj_ar = F.cross_entropy(logits.reshape(-1, K), tokens.reshape(-1)), align(hidden, target)
    norm_ar = update("ar", ce + 0.5 * proj_ar)
    expected = dict(reconstruction_loss=logs["reconstruction_loss"], perceptual_loss=logs["perceptual_loss"],
        vq_loss=logs["vq_loss"], commit_loss=logs["commit_loss"], entropy_loss=logs["entropy_loss"],
        sample_entropy=logs["sample_entropy"], avg_entropy=logs["avg_entropy"], gan_loss=logs["gan_loss"],
        proj_loss_vq=proj_vq, vq_total=total, grad_norm_vq=norm_vq, ce_loss=ce, proj_loss_ar=proj_ar,
        ar_total=ce + 0.5 * proj_ar, grad_norm_ar=norm_ar)
    if step >= 2:
        expected |= dict(d_loss=d_loss, grad_norm_disc=norm_disc, logits_real=d_logs["logits_real"])
    for name, value in expected.items():
        value = float(value.detach())
        error = abs(float(scalars[name]) - value) / max(abs(value), 0.05)
        worst[name] = max(worst.get(name, 0.0), error)
print({k: f"{v:.1e}" for k, v in worst.items()})
assert max(worst.values()) < 1e-3, worst
"""


def run_official(program: str, *arguments: str) -> None:
    checkout = os.environ.get("GEAR_OFFICIAL")
    if not checkout:
        pytest.skip("set GEAR_OFFICIAL to a checkout of the official code")
    tests = str(Path(__file__).resolve().parents[2])
    source = (PROLOGUE + program).replace("{checkout!r}", repr(checkout)).replace("{tests!r}", repr(tests))
    done = subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vq", "ibq", "lfq"])
def test_checkpoints_load_into_the_official_modules(family: str, tmp_path: Path) -> None:
    if not os.environ.get("GEAR_OFFICIAL"):
        pytest.skip("set GEAR_OFFICIAL to a checkout of the official code")
    train(config("joint", tmp_path, family, steps=2))
    run_official(LOAD, family, str(tmp_path / "checkpoints" / "0000002.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["soft", "straight_through"])
@pytest.mark.parametrize("family", ["vq", "ibq", "lfq"])
def test_joint_steps_are_the_official_ones(family: str, branch: str) -> None:
    run_official(STEPS, family, branch)
