"""One training of one backbone with one head: the loop, readable from top to bottom. It names no
method.

    views -> backbone -> z -> head.forward -> Output -> head.loss -> backward -> step ->
    head.after_step
                         |                      ^
                  bank (detached)        head.targets (no gradient, once per macro batch)
                         +-> head.refresh(bank): between macro batches, all ranks together

`step` counts macro batches everywhere. All state is in `state_dict()`; everything else follows from
the settings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.bank import collect, untouched
from deepclust.data.datasets import ImageSet
from deepclust.data.loader import Loader, ViewBatch
from deepclust.data.random import Stream, seed_for, stream_key
from deepclust.data.sampler import Plan, Sampler
from deepclust.data.views.transform import ViewTransform
from deepclust.errors import UserError
from deepclust.heads.base import (
    Bank,
    BankSpec,
    Batch,
    Head,
    Output,
    Progress,
    Targets,
    join_outputs,
)
from deepclust.model import Network
from deepclust.ops.collectives import gather_rows, row_counts
from deepclust.ops.precision import autocast
from deepclust.runtime.compilation import compile_in_place
from deepclust.runtime.distributed import World
from deepclust.training.meter import Meter
from deepclust.training.stepper import Stepper


class Stopped(Exception):
    """The run was asked to stop; the state has been handed to `Hooks.save`."""


def _nothing(*_: Any) -> None:
    return None


@dataclass
class Hooks:
    """What the trainer tells the outside, and asks it. Every rank calls `stop_requested`; the rest
    may do nothing.
    """

    log: Callable[[dict[str, float], Progress], None] = _nothing
    save: Callable[[dict[str, Any], Progress], None] = _nothing
    status: Callable[[str, Progress], None] = _nothing
    failure: Callable[[int, str], None] = _nothing
    warn: Callable[[str], None] = _nothing
    stop_requested: Callable[[], bool] = lambda: False
    interruptible: Callable[[], AbstractContextManager[Any]] = nullcontext
    save_every_steps: int = 0


class Trainer:
    """Trains `backbone` with `head` on images; labels are nowhere in its reach.

    images: the samples.
    transforms: one for each view name that the head declares, and `clean`.
    settings, optim: the stage's; None for the defaults.
    seed: of the run. stage_index: number of the stage; both decide every random number drawn here.
    world: this rank among all. hooks: what the outside is told, and asked.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        images: ImageSet,
        transforms: Mapping[str, ViewTransform],
        *,
        settings: TrainerSettings | None = None,
        optim: OptimSettings | None = None,
        seed: int = 0,
        stage_index: int = 0,
        world: World | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.settings = settings or TrainerSettings()
        self.optim = optim or OptimSettings()
        self.world = world or World(0, 1, torch.device("cpu"))
        self.hooks = hooks or Hooks()
        self.images = images
        self.transforms = transforms
        self.seed = seed
        self.stage_index = stage_index
        self.device = self.world.device
        self.network = Network(backbone, head).to(self.device)
        if self.settings.channels_last:
            self.network.backbone.to(memory_format=torch.channels_last)
        self.head: Head = self.network.head
        self.stepper = Stepper(self.network, self.optim, self.settings, self.world)
        if self.settings.compile:
            reason = compile_in_place(self.network.backbone, self.device)
            if reason is not None:
                self.hooks.warn(reason)
        self.sampler = Sampler(
            len(images),
            self.settings.batch_size,
            self.head.views,
            seed=seed,
            stage_index=stage_index,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.loader = self._loader()
        self.meter = Meter(self.world)
        self.num_epochs = self.settings.epochs
        if self.settings.num_images is not None:
            self.num_epochs = max(1, round(self.settings.num_images / len(images)))
        self.num_steps = self.num_epochs * self.steps_per_epoch
        self.last_step = min(self.num_steps, self.settings.max_steps or self.num_steps)
        self.step = 0
        # Ranks draw different numbers, e.g. in dropout: their rows are different ones too.
        torch.manual_seed(seed_for(seed, stage_index, self.world.rank, Stream.TRAINING))

    @property
    def steps_per_epoch(self) -> int:
        """Macro batches in an epoch, one pass over the samples."""
        return self.sampler.steps_per_pass

    # ---------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Trains to the end, or to `max_steps`.

        Raises Stopped if asked to stop, UserError if the loss is not finite.
        """
        if self.step == 0:
            self.prepare()
        batches: Iterator[ViewBatch] | None = None
        self.meter.start()
        while self.step < self.last_step:
            progress = self.progress()
            refreshed = self.refresh(progress)  # may change order and partners,
            if refreshed or self._starts_pass() or batches is None:
                batches = self.batches()  # so batches that were made ahead are thrown away
            sums, rows = self.train_step(next(batches), progress)
            self.meter.add(sums, rows)
            self.step += 1
            self._log_if_due()
            self._save_or_stop()
        if self.step == self.last_step:
            # Heads that group prototypes or read clusters from features do so on the final network.
            self.refresh(self.progress())
        self._choose_sub_head()

    def train_step(self, batch: ViewBatch, progress: Progress) -> tuple[dict[str, Tensor], int]:
        """One macro batch: targets once, gradients per micro batch.

        Returns the metrics summed over this rank's rows, and the number of these rows.
        """
        counts = row_counts(len(batch.index), self.world.group, self.device)
        if min(counts) == 0:
            return {}, 0
        info = Batch(batch.index.to(self.device), progress, self.world.group)
        self.network.train()
        cuts = [self._cuts(count, min(counts)) for count in counts]
        own_cuts = cuts[self.world.rank]
        micro = [slice(start, stop) for start, stop in pairwise(own_cuts)]
        outputs, targets = self._targets(batch, info, micro)
        sums: dict[str, Tensor] = {}
        detached: list[dict[int, Output]] = []
        for number, rows in enumerate(micro):
            part = outputs or self._outputs(batch, rows)
            losses = self.head.loss(part, targets[rows], info[rows])
            num_rows = rows.stop - rows.start
            # Each rank's mean loss is weighted by its share of the rows, and gradients are summed
            # over ranks: so they are those of one process with all rows, however unequal the
            # shares.
            everyone = sum(cut[number + 1] - cut[number] for cut in cuts)
            denominator = everyone if self.optim.step_per == "micro" else sum(counts)
            self.stepper.backward(losses["loss"] * (num_rows / denominator))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * num_rows
            detached.append({view: output.detach() for view, output in part.items()})
            if self.optim.step_per == "micro":
                self.stepper.step(progress)
        if self.optim.step_per == "macro":
            self.stepper.step(progress)
        info.targets = targets
        with torch.no_grad():
            self.head.after_step(join_outputs(detached), info)
        return sums, len(batch.index)

    def _cuts(self, num_rows: int, fewest: int) -> list[int]:
        """Borders of the micro batches in a rank's rows; every rank has as many, none is empty.

        num_rows: of the rank. fewest: rows of the rank that has the fewest.
        """
        parts = min(self.settings.micro_batches, fewest)
        return [num_rows * part // parts for part in range(parts + 1)]

    def _targets(
        self, batch: ViewBatch, info: Batch, micro: list[slice]
    ) -> tuple[dict[int, Output] | None, Targets]:
        """The targets of a macro batch, and its loss outputs where they were made on the way.

        Targets come from the teacher; without one from the student: with a single micro batch they
        are the detached loss outputs, so that no view goes through the network twice.
        """
        outputs = None
        reused: dict[int, Output] = {}
        if len(micro) == 1:
            outputs = self._outputs(batch, micro[0])
            if self.stepper.target_network is None:
                reused = {
                    view: output.detach()
                    for view, output in outputs.items()
                    if self.head.views[view].used_for == "both"
                }
        network = self.stepper.target_network or self.network
        everything = slice(0, len(batch.index))
        views = self._views(batch, everything, used_for="targets")
        missing = {view: images for view, images in views.items() if view not in reused}
        with torch.no_grad():
            parts = [
                network.outputs(
                    {view: images[rows] for view, images in missing.items()}, self._autocast()
                )
                for rows in micro
            ]
            return outputs, self.head.targets({**reused, **join_outputs(parts)}, info)

    def _outputs(self, batch: ViewBatch, rows: slice) -> dict[int, Output]:
        """The student's outputs for the loss on some rows, with gradient."""
        return self.network.outputs(self._views(batch, rows, used_for="loss"), self._autocast())

    def _views(
        self, batch: ViewBatch, rows: slice, used_for: Literal["loss", "targets"]
    ) -> dict[int, Tensor]:
        """Some rows of the views that the head uses for its loss, or for its targets."""
        return {
            view: images[rows]
            for view, images in batch.views.items()
            if self.head.views[view].used_for in (used_for, "both")
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.stepper.dtype)

    def _starts_pass(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    def batches(self) -> Iterator[ViewBatch]:
        """This rank's macro batches of the pass in progress, from the present step on."""
        return self.loader.batches(self.sampler.rest_of_pass(self.step))

    # ---------------------------------------------------------------- between macro batches

    def progress(self) -> Progress:
        """Where the stage stands now."""
        epoch, step_in_epoch = divmod(self.step, self.steps_per_epoch)
        seen_in_epoch = step_in_epoch * len(self.images) // self.steps_per_epoch
        return Progress(
            self.step,
            self.num_steps,
            epoch,
            self.num_epochs,
            epoch * len(self.images) + seen_in_epoch,
            self.num_epochs * len(self.images),
            self.step >= self.last_step,
        )

    def prepare(self) -> None:
        """Once, before the first step: prototypes from k-means, then the teacher as the student."""
        if self.head.needs_prototypes:
            self.hooks.status("clustering", self.progress())
            with self.hooks.interruptible():
                self.head.init_prototypes(self.bank(BankSpec()))
        self.stepper.start_teacher()

    def refresh(self, progress: Progress) -> bool:
        """Gives the head the bank it wants and applies what it asks for; False if none is due.

        A stop inside leaves the state before: whoever resumes does the whole refresh again.
        """
        spec = self.head.bank_due(progress)
        if spec is None:
            return False
        self.hooks.status("clustering", progress)
        head_state = copy.deepcopy(self.head.state_dict())
        random_state = torch.get_rng_state()
        try:
            with self.hooks.interruptible(), torch.no_grad():
                refresh = self.head.refresh(self.bank(spec))
        except BaseException:
            self.head.load_state_dict(head_state)
            torch.set_rng_state(random_state)
            raise
        self.sampler.accept(refresh)
        self.stepper.reset_parameters(refresh.reset)
        self.hooks.status("running", progress)
        return True

    @torch.no_grad()
    def bank(self, spec: BankSpec) -> Bank:
        """Features of this rank's block of samples as `spec` asks, by the teacher if there is
        one."""
        group = self.world.group
        final = self.step >= self.last_step
        if not spec.needs_pass:
            nothing = torch.empty(0, device=self.device)
            no_index = torch.empty(0, dtype=torch.int64, device=self.device)
            return Bank(nothing, no_index, len(self.images), group, final)
        with untouched(self.eval_network, spec.mode):
            features, index = collect(
                self._bank_function(spec),
                self.images,
                self.transforms[spec.view],
                self._bank_rows(spec),
                device=self.device,
                seed=stream_key(self.seed, self.stage_index, self.step, Stream.BANK),
            )
        if spec.mode == "train":  # back from the mixed order to that of the block
            features = features[index.argsort()]
            index = index.sort().values
        return Bank(features, index.to(self.device), len(self.images), group, final)

    def _bank_rows(self, spec: BankSpec) -> Sequence[int]:
        """Indices of the samples that this rank passes for a bank, in their order."""
        rows: Sequence[int] = self.world.block(len(self.images))
        if spec.num_samples is not None and spec.num_samples < len(self.images):
            block = self.world.block(spec.num_samples)
            rows = self._permutation(len(self.images))[block.start : block.stop]
        if spec.mode == "train":  # batch statistics of mixed images, whatever the order of the set
            rows = [rows[position] for position in self._permutation(len(rows))]
        return rows

    def _permutation(self, count: int) -> list[int]:
        """A permutation that belongs to this step. Passes are numbered from 0 on, banks below 0."""
        plan = Plan.draw(count, 1, self.seed, self.stage_index, -1 - self.step, None)
        return plan.order.tolist()

    def _bank_function(self, spec: BankSpec) -> Callable[[Tensor], Tensor]:
        """From a view (B, C, H, W) to what the bank holds: z, or the head's embedding of it."""
        network = self.eval_network

        def features(view: Tensor) -> Tensor:
            return network.features(view, self._autocast())

        def embedding(view: Tensor) -> Tensor:
            output = network.outputs({0: view}, self._autocast())[0]
            return output.z if output.embedding is None else output.embedding

        return features if spec.of == "z" else embedding

    def _choose_sub_head(self) -> None:
        """The sub-head with the lowest label-free score becomes `best`; ranks take rank 0's."""
        if self.head.num_heads > 1:
            bank = self.bank(BankSpec())
            with untouched(self.eval_network), self._student_buffers_in_teacher():
                scores = self.eval_network.head.score(bank)
            best = int(self.world.broadcast(int(scores.argmin())))
            for network in (self.network, self.eval_network):
                network.head.best.fill_(best)

    @contextmanager
    def _student_buffers_in_teacher(self) -> Iterator[None]:
        """Lends the teacher's head the student's `training_buffers`.

        `score` reads them (mined neighbours, for example), but the teacher never receives them.
        Restores the teacher's own afterwards.
        """
        names = self.head.training_buffers if self.eval_network is not self.network else ()
        buffers = {name: self.eval_network.head.get_buffer(name) for name in names}
        saved = {name: buffer.clone() for name, buffer in buffers.items()}
        for name, buffer in buffers.items():
            buffer.copy_(self.head.get_buffer(name))
        yield
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])

    @property
    def eval_network(self) -> Network:
        """What evaluation and export use: the teacher where there is one."""
        return self.stepper.teacher or self.network

    def _loader(self) -> Loader:
        engine = self.settings.views
        in_memory = self.images.images is not None
        if engine == "auto":
            engine = "device" if in_memory else "workers"
        if engine == "device" and not in_memory:
            raise UserError(
                "trainer.views=device needs the images in memory; use workers, or raise"
                " data.memory_mb"
            )
        return Loader(
            self.images,
            self.head.views,
            self.transforms,
            device=self.device,
            num_workers=self.settings.num_workers,
            engine=engine,
            on_failure=self.hooks.failure,
        )

    def _log_if_due(self) -> None:
        if self.step % self.settings.log_every_steps == 0 or self.step == self.last_step:
            self.hooks.log(self._checked(self.meter.flush()), self.progress())

    def _checked(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics with the learning rate. Raises UserError for a loss that is not finite."""
        loss = metrics.get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {self.step} of stage {self.stage_index}; the last "
                f"checkpoint is older. Try a lower optim.lr (now {self.optim.lr:g}), "
                "trainer.precision=float32 or trainer.clip_norm=1"
            )
        return {**metrics, "lr": self.stepper.learning_rate}

    # ---------------------------------------------------------------- state

    def _save_or_stop(self) -> None:
        stop = self.hooks.stop_requested()
        every = self.hooks.save_every_steps
        # After the last step the recipe saves, once the sub-head is chosen.
        due = every and self.step % every == 0 and self.step < self.last_step
        if stop or due:
            self.hooks.save(self.state_dict(), self.progress())
        if stop:
            raise Stopped

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later step depends on, by part.

        All ranks call it, and get the same but for the parts `rank*`, which belong to one rank
        each.
        """
        on_cuda = self.device.type == "cuda"
        buffers = {name: self.head.get_buffer(name).cpu() for name in self.head.sharded_buffers}
        rank_state = {
            "rng": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "buffers": buffers,
            "meter": self.meter.state_dict(),
        }
        ranks = {f"rank{rank}": part for rank, part in enumerate(self.world.gather(rank_state))}
        sampler = {"step": self.step, **self.sampler.state_dict()}
        return {**self.stepper.state_dict(), "sampler": sampler, **ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        With another number of ranks the random state is drawn anew.
        """
        self.stepper.load_state_dict(state)
        self.step = state["sampler"]["step"]
        self.sampler.load_state_dict(state["sampler"])
        more_ranks = f"rank{self.world.size}" in state
        rank_state = None if more_ranks else state.get(f"rank{self.world.rank}")
        if rank_state is None:
            return
        torch.set_rng_state(rank_state["rng"])
        self.meter.load_state_dict(rank_state["meter"])
        if rank_state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(rank_state["cuda"], self.device)
        for name, value in rank_state["buffers"].items():
            self.head.get_buffer(name).copy_(value)

    def features(self, images: ImageSet | None = None) -> tuple[Tensor, Tensor]:
        """Clean features (n, D) float32 and sample indices (n,) of all readable images, on the CPU.

        On every rank. In float32 whatever the precision of the training, so that an exported model
        finds the same clusters again.
        """
        images = images or self.images
        network = self.eval_network
        with untouched(network), self.hooks.interruptible():
            features, index = collect(
                network.features,
                images,
                self.transforms["clean"],
                self.world.block(len(images)),
                device=self.device,
            )
        features, _ = gather_rows(features, self.world.group)
        index, _ = gather_rows(index.to(self.device), self.world.group)
        return features.cpu(), index.cpu()
