"""The sections of a training configuration: frozen settings, validated once; defaults are the official trainer's.

Source of the defaults: Tencent-Hunyuan/GEAR ``src/train_tokenizer.py`` (stage 0), ``src/train_gear.py`` (stage 1),
``src/train_ar.py`` (stage 2) and ``src/configs/loss_l1_lpips_gan_vq.yaml``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gear_engine.config import GENERATOR_PRESETS, GeneratorConfig, TokenizerConfig
from gear_engine.training.checks import at_least, below_one, one_of, require

__all__ = [
    "AlignmentConfig",
    "DataConfig",
    "EncoderConfig",
    "GeneratorSettings",
    "InitConfig",
    "LossConfig",
    "OptimizerConfig",
    "OutputConfig",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from.

    Attributes:
        path: a folder ``<class>/<image>``, or an ``.npz`` file with ``images`` (uint8 [N, H, W, 3]) and ``labels`` [N].
            Empty if a source is handed to the trainer.
        image_size: edge in pixels. Images of a folder are resized (bicubic) so that their shorter edge has it.
        crop: ``"random"`` or ``"center"``.
        flip: mirror half of the images.
        workers: processes that decode images.
    """

    path: str = ""
    image_size: int = 256
    crop: Literal["random", "center"] = "random"
    flip: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size")
        at_least(self, 0, "workers")
        one_of(self, "crop", ("random", "center"))


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """The generator; its vocabulary and grid follow from the tokenizer.

    Attributes:
        preset: a published size such as ``"LlamaGen-B"``, or "" with ``dim``, ``n_layer``, ``n_head``.
        ffn_dim: SwiGLU width; 0: the published rule.
        num_classes: labels; 0: as many as the data has.
        dropout: after each attention and feed-forward block.
        token_dropout: on the embedded sequence.
        label_dropout: share of labels replaced by the unconditional class.
    """

    preset: str = ""
    dim: int = 0
    n_layer: int = 0
    n_head: int = 0
    ffn_dim: int = 0
    num_classes: int = 0
    dropout: float = 0.1
    token_dropout: float = 0.1
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        below_one(self, "dropout", "token_dropout", "label_dropout")
        at_least(self, 0, "num_classes", "ffn_dim")
        if self.preset:
            require(
                self.preset in GENERATOR_PRESETS and GENERATOR_PRESETS[self.preset].conditioning == "class",
                f"generator.preset {self.preset!r} is no class-conditional size; known: LlamaGen-S, -B, -L, -XL …",
            )
            require(not (self.dim or self.n_layer or self.n_head), "give generator.preset or dim, n_layer and n_head")
        else:
            at_least(self, 1, "dim", "n_layer", "n_head")

    def resolve(self, tokenizer: TokenizerConfig, image_size: int, num_classes: int) -> GeneratorConfig:
        """The model's configuration for images of ``image_size`` pixels of ``num_classes`` classes."""
        preset = GENERATOR_PRESETS.get(self.preset)
        sizes = preset or self
        rows, columns = tokenizer.latent_size(image_size, image_size)
        require(tokenizer.num_codebooks == 1, "a tokenizer with several indices per position drives no generator")
        return GeneratorConfig(
            dim=sizes.dim,
            n_layer=sizes.n_layer,
            n_head=sizes.n_head,
            ffn_dim=sizes.ffn_dim,
            vocab_size=tokenizer.codebook_size,
            block_size=rows * columns,
            num_classes=num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The tokenizer's losses: ``reconstruction + perceptual + quantizer + adversarial``, each times its weight.

    Attributes:
        reconstruction: ``"l1"`` or ``"l2"``.
        perceptual: ``"lpips"`` (files ``lpips_vgg`` and ``lpips_linear``), ``"encoder"`` (features of the run's own
            encoder) or ``"none"``.
        quantizer_weight: of codebook loss + commitment + entropy terms.
        entropy_ratio: of the entropy term inside the quantizer; ``commitment`` is the quantizer's beta.
        adversarial_weight: of the adversarial term, 0 for no discriminator; ``adaptive``: times the ratio of the norms
            of both losses' gradients at the decoder's last layer.
        adversarial_start: first step with a discriminator.
        discriminator_channels, discriminator_layers, discriminator_norm: PatchGAN; norm ``"batch"`` or ``"group"``.
        lecam_weight, lecam_decay: LeCam regularisation of the discriminator.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    reconstruction_weight: float = 1.0
    perceptual: Literal["lpips", "encoder", "none"] = "lpips"
    perceptual_weight: float = 1.0
    lpips_vgg: str = ""
    lpips_linear: str = ""
    quantizer_weight: float = 1.0
    entropy_ratio: float = 0.05
    commitment: float = 0.25
    adversarial_weight: float = 0.1
    adversarial_start: int = 0
    adaptive: bool = False
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_norm: Literal["batch", "group"] = "batch"
    lecam_weight: float = 0.0
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        one_of(self, "reconstruction", ("l1", "l2"))
        one_of(self, "perceptual", ("lpips", "encoder", "none"))
        one_of(self, "discriminator_norm", ("batch", "group"))
        at_least(self, 0, "reconstruction_weight", "perceptual_weight", "quantizer_weight", "entropy_ratio")
        at_least(self, 0, "commitment", "adversarial_weight", "adversarial_start", "lecam_weight")
        at_least(self, 1, "discriminator_channels", "discriminator_layers")
        below_one(self, "lecam_decay")


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Representation alignment (REPA): hidden states after block ``depth`` against an encoder's patch features.

    Attributes:
        depth: tapped block, 1-based.
        generator_weight, tokenizer_weight: of the alignment in the generator's and in the tokenizer's total.
        projector_dim: hidden width of the projector.
        tau: temperature of the soft read-out ``softmax(-d / tau) @ E``.
        branch: what the frozen generator reads when the tokenizer is aligned: ``"soft"``, or ``"straight_through"``
            (the hard vectors forward, the gradient of the soft ones).
        spatial_norm: of the targets, per channel over the grid: ``"none"``, ``"demean"`` or ``"zscore"``;
            ``spatial_norm_alpha`` is the share of the mean that is taken off.
    """

    depth: int = 8
    generator_weight: float = 0.5
    tokenizer_weight: float = 1.5
    projector_dim: int = 2048
    tau: float = 1.0
    branch: Literal["soft", "straight_through"] = "soft"
    spatial_norm: Literal["none", "demean", "zscore"] = "none"
    spatial_norm_alpha: float = 0.6

    def __post_init__(self) -> None:
        at_least(self, 1, "depth", "projector_dim")
        at_least(self, 0, "generator_weight", "tokenizer_weight", "spatial_norm_alpha")
        require(self.tau > 0 and math.isfinite(self.tau), f"tau must be positive and finite, got {self.tau}")
        one_of(self, "branch", ("soft", "straight_through"))
        one_of(self, "spatial_norm", ("none", "demean", "zscore"))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder of the alignment targets, and of the perceptual loss ``"encoder"``.

    Attributes:
        kind: ``"dinov2"`` (a folder of transformers' weights at ``path``), ``"small"`` (a convolutional classifier,
            trained before the first step on the run's own data, or read from ``path``) or ``"none"``.
        path: DINOv2's folder; or a checkpoint that holds a small encoder.
        layer: dinov2 only: -1 for the normalised output, n for the output of block n.
        steps, batch_size, learning_rate, width: training and size of the small encoder.
    """

    kind: Literal["dinov2", "small", "none"] = "dinov2"
    path: str = ""
    layer: int = -1
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-3
    width: int = 64

    def __post_init__(self) -> None:
        one_of(self, "kind", ("dinov2", "small", "none"))
        at_least(self, 1, "steps", "batch_size", "width")
        require(self.layer == -1 or self.layer >= 1, f"layer must be -1 or at least 1, got {self.layer}")
        require(self.width % 8 == 0, f"width {self.width} must be a multiple of 8 (group norm has 8 groups)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule, shared by all optimizers of a run.

    Attributes:
        warmup_steps: linear warm-up from 0; with 1 the first step changes nothing, as officially.
        schedule: after the warm-up ``"constant"``, or ``"cosine"`` down to ``final_ratio`` times the rate.
        max_grad_norm: gradients of each optimizer are clipped to this total norm.
        ema_decay: of the averaged weights.
    """

    generator_lr: float = 1e-4
    tokenizer_lr: float = 1e-4
    discriminator_lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    warmup_steps: int = 1
    schedule: Literal["constant", "cosine"] = "constant"
    final_ratio: float = 0.1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        at_least(self, 0, "generator_lr", "tokenizer_lr", "discriminator_lr", "weight_decay", "warmup_steps")
        at_least(self, 0, "final_ratio", "epsilon")
        below_one(self, "beta1", "beta2", "ema_decay")
        one_of(self, "schedule", ("constant", "cosine"))
        require(self.max_grad_norm > 0, f"max_grad_norm must be positive, got {self.max_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights that a run starts from.

    Attributes:
        tokenizer: checkpoint with a tokenizer; of a stage-0 file of ours the discriminator and the small encoder are
            taken too. Needed by the ``"generator"`` stage.
        generator: checkpoint with a generator (and its projector, where the file has one).
        use_ema: averaged weights, for the frozen tokenizer and for the generator.
    """

    tokenizer: str = ""
    generator: str = ""
    use_ema: bool = True


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run writes into ``folder``; steps between two of each, 0 for never.

    Attributes:
        checkpoint_every: files ``checkpoints/<step>.pt``; the last step is always saved. ``keep``: how many stay.
        log_every: lines of ``log.jsonl``.
        sample_every: pictures in ``samples/``: ``sample_count`` images, guidance ``sample_cfg_scale``.
    """

    folder: str = "run"
    checkpoint_every: int = 1000
    keep: int = 3
    log_every: int = 10
    sample_every: int = 1000
    sample_count: int = 8
    sample_cfg_scale: float = 2.0

    def __post_init__(self) -> None:
        at_least(self, 0, "checkpoint_every", "sample_every")
        at_least(self, 1, "keep", "log_every", "sample_count")
        at_least(self, 0.0, "sample_cfg_scale")
