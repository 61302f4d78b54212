"""One training of one backbone with one head: the loop, readable from top to bottom. It names no method.

    views -> backbone -> z -> head.forward -> Output -> head.loss -> backward -> step -> head.after_step
                         |                      ^
                  bank (detached)        head.targets (no gradient, once per macro batch)
                         +-> head.refresh(bank): between macro batches, all ranks together

`step` counts macro batches everywhere. All state is in `state_dict()`; everything else follows from the settings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.compilation import compile_in_place
from deepclust.data.bank import collect, untouched
from deepclust.data.datasets import ImageSet
from deepclust.data.loader import Loader, Plan, ViewBatch
from deepclust.data.random import Stream, seed_for, stream_key
from deepclust.data.views import ViewTransform
from deepclust.distributed import World
from deepclust.errors import UserError
from deepclust.heads.base import Bank, BankSpec, Batch, Head, Output, Progress, Targets, join_outputs
from deepclust.loggers.meter import Meter
from deepclust.model import Network
from deepclust.ops.collectives import gather_rows, row_counts
from deepclust.precision import autocast
from deepclust.settings import OptimSettings, TrainerSettings
from deepclust.stepper import Stepper


class Stopped(Exception):
    """The run was asked to stop; the state has been handed to `Hooks.save`."""


def _nothing(*_: Any) -> None:
    return None


@dataclass
class Hooks:
    """What the trainer tells the outside, and asks it. Every rank calls `stop_requested`; the rest may do nothing."""

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

    transforms: one for each view name that the head declares, and `clean`.
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
        stage: int = 0,
        world: World | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.settings, self.optim = settings or TrainerSettings(), optim or OptimSettings()
        self.world = world or World(0, 1, torch.device("cpu"))
        self.hooks = hooks or Hooks()
        self.images, self.transforms, self.seed, self.stage = images, transforms, seed, stage
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
        self.steps_per_epoch = -(-len(images) // self.settings.batch_size)
        budget = self.settings.num_images
        self.num_epochs = self.settings.epochs if budget is None else max(1, round(budget / len(images)))
        self.num_steps = self.num_epochs * self.steps_per_epoch
        self.last_step = min(self.num_steps, self.settings.max_steps or self.num_steps)
        self.step = 0
        self.order: Tensor | None = None
        self.next_order: Tensor | None = None
        self.loader = self._loader()
        self.meter = Meter(self.world)
        torch.manual_seed(seed_for(seed, stage, self.world.rank, Stream.TRAINING))

    # ---------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Trains to the end, or to `max_steps`. Raises Stopped if asked to, UserError if the loss is not finite."""
        last = self.last_step
        if self.step == 0:
            self._prepare()
        batches: Iterator[ViewBatch] | None = None
        self.meter.start()
        while self.step < last:
            progress = self.progress()
            if self._refresh(progress) or batches is None or self.step % self.steps_per_epoch == 0:
                batches = self._open_pass()
            self.meter.add(*self.train_step(next(batches), progress))
            self.step += 1
            if self.step % self.settings.log_every_steps == 0 or self.step == last:
                self.hooks.log(self._checked(self.meter.flush()), self.progress())
            self._save_or_stop(last)
        if self.step == last:
            self._refresh(self.progress())
        self._choose_sub_head()

    def train_step(self, batch: ViewBatch, progress: Progress) -> tuple[dict[str, Tensor], int]:
        """One macro batch: targets once, gradients per micro batch. Returns its summed metrics and this rank's rows."""
        counts = row_counts(len(batch.index), self.world.group, self.device)
        if min(counts) == 0:
            return {}, 0
        about = Batch(batch.index.to(self.device), progress, self.world.group)
        self.network.train()
        cuts = [self._cuts(count, min(counts)) for count in counts]
        mine = [slice(start, stop) for start, stop in zip(cuts[self.world.rank], cuts[self.world.rank][1:])]
        outputs, targets = self._targets(batch, about, mine)
        sums: dict[str, Tensor] = {}
        done: list[dict[int, Output]] = []
        for number, rows in enumerate(mine):
            part = outputs or self.network.outputs(self._views(batch, rows, "targets"), self._autocast())
            losses = self.head.loss(part, targets[rows], about[rows])
            everyone = sum(cut[number + 1] - cut[number] for cut in cuts)
            denominator = everyone if self.optim.step_per == "micro" else sum(counts)
            self.stepper.backward(losses["loss"] * ((rows.stop - rows.start) / denominator))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * (rows.stop - rows.start)
            done.append({view: output.detach() for view, output in part.items()})
            if self.optim.step_per == "micro":
                self.stepper.step(progress)
        if self.optim.step_per == "macro":
            self.stepper.step(progress)
        about.targets = targets
        with torch.no_grad():
            self.head.after_step(join_outputs(done), about)
        return sums, len(batch.index)

    def _cuts(self, num_rows: int, fewest: int) -> list[int]:
        """Borders of the micro batches in a rank's rows; every rank has equally many, none of them empty."""
        parts = min(self.settings.micro_batches, fewest)
        return [num_rows * part // parts for part in range(parts + 1)]

    def _targets(self, batch: ViewBatch, about: Batch, micro: list[slice]) -> tuple[dict[int, Output] | None, Targets]:
        """The targets of a macro batch, and its loss outputs where they were made on the way.

        Targets come from the teacher; without one from the student: with a single micro batch they are the detached
        loss outputs, so that no view goes through the network twice.
        """
        everything = slice(0, len(batch.index))
        outputs = None
        if len(micro) == 1:
            outputs = self.network.outputs(self._views(batch, everything, "targets"), self._autocast())
        with torch.no_grad():
            seen: dict[int, Output] = {}
            if self.stepper.target_maker is None and outputs is not None:
                seen = {n: out.detach() for n, out in outputs.items() if self.head.views[n].used_for == "both"}
            wanted = {n: view for n, view in self._views(batch, everything, "loss").items() if n not in seen}
            source = self.stepper.target_maker or self.network
            parts = [source.outputs({n: view[rows] for n, view in wanted.items()}, self._autocast()) for rows in micro]
            return outputs, self.head.targets({**seen, **join_outputs(parts)}, about)

    def _views(self, batch: ViewBatch, rows: slice, leave_out: str) -> dict[int, Tensor]:
        """The views of some rows, without those used only for `leave_out`."""
        return {n: view[rows] for n, view in batch.views.items() if self.head.views[n].used_for != leave_out}

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.stepper.dtype)

    # ---------------------------------------------------------------- between macro batches

    def progress(self) -> Progress:
        """Where the stage stands now."""
        epoch = self.step // self.steps_per_epoch
        total = self.num_epochs * len(self.images)
        seen = epoch * len(self.images) + (self.step % self.steps_per_epoch) * len(self.images) // self.steps_per_epoch
        return Progress(self.step, self.num_steps, epoch, self.num_epochs, seen, total, self.step >= self.last_step)

    def _prepare(self) -> None:
        """What happens once, before the first step: prototypes from k-means, then the teacher begins as the student."""
        if self.head.wants_prototypes:
            self.hooks.status("clustering", self.progress())
            with self.hooks.interruptible():
                self.head.init_prototypes(self.bank(BankSpec()))
        self.stepper.start_teacher()

    def _refresh(self, progress: Progress) -> bool:
        """Gives the head the bank it wants and applies what it asks for. A stop inside leaves the state before."""
        spec = self.head.bank_due(progress)
        if spec is None:
            return False
        self.hooks.status("clustering", progress)
        before, random_state = copy.deepcopy(self.head.state_dict()), torch.get_rng_state()
        try:
            with self.hooks.interruptible(), torch.no_grad():
                asked = self.head.refresh(self.bank(spec))
        except BaseException:
            self.head.load_state_dict(before)
            torch.set_rng_state(random_state)
            raise
        self.loader.partners = self.loader.partners if asked.partners is None else asked.partners.cpu()
        self.next_order = self.next_order if asked.order is None else asked.order.cpu()
        self.stepper.redrawn(asked.reset)
        self.hooks.status("running", progress)
        return True

    @torch.no_grad()
    def bank(self, spec: BankSpec) -> Bank:
        """Features of this rank's block of samples as `spec` asks, by the teacher where there is one."""
        source, group, final = self.evaluated, self.world.group, self.step >= self.last_step
        if not spec.needs_pass:
            empty = torch.empty(0, device=self.device)
            return Bank(empty, torch.empty(0, dtype=torch.int64, device=self.device), len(self.images), group, final)
        rows: Any = self.world.block(len(self.images))
        if spec.num_samples is not None and spec.num_samples < len(self.images):
            block = self.world.block(spec.num_samples)
            order = Plan.draw(len(self.images), 1, self.seed, self.stage, -1 - self.step, None).order
            rows = order[block.start : block.stop].tolist()
        if spec.mode == "train":  # batch statistics of mixed images, whatever the order of the set
            mixed = Plan.draw(len(rows), 1, self.seed, self.stage, -1 - self.step, None).order
            rows = [rows[place] for place in mixed.tolist()]

        def forward(view: Tensor) -> Tensor:
            if spec.of == "z":
                return source.features(view, self._autocast())
            output = source.outputs({0: view}, self._autocast())[0]
            return output.z if output.embedding is None else output.embedding

        with untouched(source, spec.mode):
            view = self.transforms[spec.view]
            seed = stream_key(self.seed, self.stage, self.step, Stream.BANK)
            features, index = collect(forward, self.images, view, rows, device=self.device, seed=seed)
        if spec.mode == "train":
            features, index = features[index.argsort()], index.sort().values
        return Bank(features, index.to(self.device), len(self.images), group, final)

    def _choose_sub_head(self) -> None:
        """The sub-head with the lowest label-free score becomes `best`; ranks agree on rank 0's."""
        if self.head.num_heads > 1:
            bank = self.bank(BankSpec())
            with untouched(self.evaluated), self._lent():
                scores = self.evaluated.head.score(bank)
            best = int(self.world.broadcast(int(scores.argmin())))
            for network in (self.network, self.evaluated):
                network.head.best.fill_(best)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """The teacher's head has the student's buffers for training alone, which it is never given, and then its own.

        A head may keep there what `score` needs, as the neighbours it mined.
        """
        names = self.head.training_buffers if self.evaluated is not self.network else ()
        buffers = {name: self.evaluated.head.get_buffer(name) for name in names}
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        for name, buffer in buffers.items():
            buffer.copy_(self.head.get_buffer(name))
        yield
        for name, buffer in buffers.items():
            buffer.copy_(own[name])

    @property
    def evaluated(self) -> Network:
        """What evaluation and export use: the teacher where there is one."""
        return self.stepper.teacher or self.network

    def _open_pass(self) -> Iterator[ViewBatch]:
        epoch, start = divmod(self.step, self.steps_per_epoch)
        if start == 0:
            self.order, self.next_order = self.next_order, None
        size = -(-len(self.order) // self.steps_per_epoch) if self.order is not None else self.settings.batch_size
        plan = Plan.draw(len(self.images), size, self.seed, self.stage, epoch, self.order)
        return self.loader.batches(plan, epoch, start)

    def _loader(self) -> Loader:
        engine = self.settings.views
        if engine == "auto":
            engine = "device" if self.images.images is not None else "workers"
        if engine == "device" and self.images.images is None:
            raise UserError("trainer.views=device needs the images in memory; use workers, or raise data.memory_mb")
        return Loader(
            self.images,
            self.head.views,
            self.transforms,
            seed=self.seed,
            stage=self.stage,
            rank=self.world.rank,
            size=self.world.size,
            device=self.device,
            num_workers=self.settings.num_workers,
            engine=engine,
            on_failure=self.hooks.failure,
        )

    def _checked(self, metrics: dict[str, float]) -> dict[str, float]:
        loss = metrics.get("loss", 0.0)
        if loss != loss or abs(loss) == float("inf"):
            raise UserError(
                f"the loss became {loss} at step {self.step} of stage {self.stage}; the last checkpoint is older. "
                f"Try a lower optim.lr (now {self.optim.lr:g}), trainer.precision=float32 or trainer.clip_norm=1"
            )
        return {**metrics, "lr": self.stepper.learning_rate}

    # ---------------------------------------------------------------- state

    def _save_or_stop(self, last: int) -> None:
        every, stop = self.hooks.save_every_steps, self.hooks.stop_requested()
        if stop or (every and self.step % every == 0 and self.step < last):
            self.hooks.save(self.state_dict(), self.progress())
        if stop:
            raise Stopped

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later step depends on, by part; all ranks call it, and get the same but for `rank*`."""
        own = {
            "rng": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "buffers": {name: self.head.get_buffer(name).cpu() for name in self.head.sharded_buffers},
            "meter": self.meter.state_dict(),
        }
        sampler = {
            "step": self.step,
            "order": self.order,
            "next_order": self.next_order,
            "partners": self.loader.partners,
        }
        ranks = {f"rank{rank}": part for rank, part in enumerate(self.world.gather(own))}
        return {**self.stepper.state_dict(), "sampler": sampler, **ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken. With another number of ranks the random state is drawn anew."""
        self.stepper.load_state_dict(state)
        sampler = state["sampler"]
        self.step, self.order, self.next_order = sampler["step"], sampler["order"], sampler["next_order"]
        self.loader.partners = sampler["partners"]
        own = state.get(f"rank{self.world.rank}") if f"rank{self.world.size}" not in state else None
        if own is not None:
            torch.set_rng_state(own["rng"])
            self.meter.load_state_dict(own["meter"])
            if own["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"], self.device)
            for name, value in own["buffers"].items():
                self.head.get_buffer(name).copy_(value)

    def features(self, images: ImageSet | None = None) -> tuple[Tensor, Tensor]:
        """Clean features (n, D) and sample indices (n,) of all readable images, on every rank, on the CPU.

        In float32 whatever the precision of the training: an exported model finds the same clusters again.
        """
        images = images or self.images
        with untouched(self.evaluated), self.hooks.interruptible():
            block = self.world.block(len(images))
            clean, network = self.transforms["clean"], self.evaluated
            found, index = collect(network.features, images, clean, block, device=self.device)
        features, _ = gather_rows(found, self.world.group)
        indices, _ = gather_rows(index.to(self.device), self.world.group)
        return features.cpu(), indices.cpu()
