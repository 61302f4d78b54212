"""Sections of the configuration that no method owns. Plain data: importing this file imports no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from deepclust.types import Count, Decay, Fraction, Natural, NonNegative, Positive, Range


@dataclass(frozen=True)
class JobSettings:
    """The keys at the top. num_clusters: None = the number of classes. resume: auto, never or a
    checkpoint's path.

    trust: names of modules of your own that `_target_` may build from; command line only.
    """

    seed: Annotated[int, Range(ge=0, le=2**32 - 1)] = 0
    num_clusters: Count | None = None
    resume: str = "auto"
    trust: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives. `name` defaults to recipe-head-data-seed; the folder is `root/name` unless
    `dir` is given.
    """

    name: str | None = None
    root: str = "outputs"
    dir: str | None = None
    new: bool = False
    traceback: bool = False


@dataclass(frozen=True)
class CheckpointSettings:
    """`every_steps` counts macro batches; a stage's last checkpoint is always written.

    keep: how many recent ones stay.
    """

    every_steps: Count = 200
    keep: Count = 2


@dataclass(frozen=True)
class DistributedSettings:
    """`timeout_seconds`: how long a rank waits for another before the job ends with an error."""

    timeout_seconds: Positive = 1800.0
    sync_batchnorm: bool = True


@dataclass(frozen=True)
class TrainerSettings:
    """One stage's loop. Steps count macro batches.

    num_images: length of the stage in images seen, in place of `epochs`: small sets get many
    passes, large ones few.
    extra_images: also trains on what the data set has besides the images to cluster (`data=stl10
    data.extra=true`).
    batch_size: rows of one macro batch over all ranks. micro_batches: equal parts it is cut into
    for the gradients.
    max_steps: stops the stage early (for trying things out); the schedule still spans `epochs`.
    ema: decay of the stage's teacher, None for no teacher. ema_mode `reference`: as in SCAN's code,
    see `Stepper`.

    precision `auto`: bf16 autocast where the device has it natively, float16 with scaled losses on
    GPUs that have not, float32 on other processors. device `auto`: a GPU of NVIDIA or AMD, under
    torchrun each rank's own; else the CPU, on Macs as well.
    compile: the backbone through torch.compile; where no compiler works, training goes on without
    it. views `auto`: batched on the device if the images are in memory as uint8, else per sample in
    loader workers.
    """

    epochs: Count = 50
    num_images: Count | None = None
    max_steps: Count | None = None
    extra_images: bool = False
    batch_size: Count = 256
    micro_batches: Count = 1
    ema: Decay | None = None
    ema_mode: Literal["teacher", "reference"] = "teacher"
    clip_norm: Positive | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    device: str = "auto"
    num_threads: Count | None = None
    num_workers: Natural = 2
    views: Literal["auto", "device", "workers"] = "auto"
    log_every_steps: Count = 10
    deterministic: bool = False


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser and schedule of a stage. Rates are for optimiser steps; see
    `deepclust.training.optim` for the formulas.

    name: `adam` has L2 decay in its gradient, `adamw` beside it; `lars` is SGD whose step follows
    each tensor's norm.
    head_lr: of the head's parameters, default lr. backbone_lr: of the backbone's, default lr; 0
    freezes it.
    momentum, nesterov: of sgd and lars. betas: of adam and adamw. trust: of lars;
    adapt_bias_and_norm: whether lars scales one-dimensional parameters too. decay_bias_and_norm:
    whether they decay.

    warmup_start_fraction: the warm-up's first rate as a fraction of lr, its last being lr; None:
    even steps up from 0.
    schedule: `cosine` to `final_lr_fraction * lr`, `constant`, or `step`: times `milestone_factor`
    at each milestone.
    milestones: epochs, which need not be whole; values below 1 are shares of the stage.
    schedule_per: `epoch` holds the rate during an epoch, as some references do; the warm-up moves
    in each step.
    step_per: `macro` = gradients of all micro batches make one step; `micro` = one step per micro
    batch.
    """

    name: Literal["adamw", "adam", "sgd", "lars"] = "adamw"
    lr: Positive = 1e-3
    head_lr: NonNegative | None = None
    backbone_lr: NonNegative | None = None
    weight_decay: NonNegative = 1e-4
    momentum: Decay = 0.9
    nesterov: bool = False
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    trust: Positive = 0.001
    adapt_bias_and_norm: bool = True
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    schedule_per: Literal["step", "epoch"] = "step"
    warmup_steps: Natural = 0
    warmup_epochs: NonNegative = 0.0
    warmup_start_fraction: Fraction | None = None
    final_lr_fraction: NonNegative = 0.0
    milestones: list[Positive] = field(default_factory=list)
    milestone_factor: Positive = 0.1
    decay_bias_and_norm: bool = False
    step_per: Literal["macro", "micro"] = "macro"


@dataclass(frozen=True)
class EvalSettings:
    """What is reported after each stage. Labels, where the data set has them, are read here and
    nowhere else.

    baselines: `all`, `none` or a list of kmeans, gmm, spectral, tsne_gmm, pixels; fitted on at most
    `baseline_samples`.
    graph_neighbors: neighbours per image in the pretext's fixed graph, on which stages are
    compared.
    calibration: whether confidences are held against labels, where there are some, and against
    independent clusterings.
    """

    baselines: (
        Literal["all", "none"] | list[Literal["kmeans", "gmm", "spectral", "tsne_gmm", "pixels"]]
    ) = "all"
    baseline_samples: Count = 5000
    graph_neighbors: Count = 10
    probes: bool = True
    calibration: bool = True
    gallery_images: Count = 24


@dataclass(frozen=True)
class LoggerSettings:
    """Where figures go besides metrics.jsonl, metrics.csv and log.txt, which are always written to
    the run folder.

    console: progress on the terminal. tensorboard: event files in the run folder.
    wandb: Weights & Biases mode; `wandb_project` and `wandb_entity` say where.
    """

    console: bool = True
    tensorboard: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "deepclust"
    wandb_entity: str | None = None


SETTINGS = {
    "run": RunSettings,
    "checkpoint": CheckpointSettings,
    "distributed": DistributedSettings,
    "eval": EvalSettings,
    "logger": LoggerSettings,
    "trainer": TrainerSettings,
    "optim": OptimSettings,
}
SECTIONS = {key: f"deepclust.config.settings.{kind.__name__}" for key, kind in SETTINGS.items()}
"""Sections of plain values, and the dataclass that describes each."""
