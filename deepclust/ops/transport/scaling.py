"""Matrix scaling exp(sharpness * benefit) -> diag(a) . diag(b) that neither overflows nor
underflows.

A cluster's scale b is split: the bulk of its logarithm is absorbed into the stored kernel, the rest
multiplies it. Every row of the kernel is divided by its largest entry. The kernel is rebuilt when
the rest grows, which gives what a logarithmic domain gives at the price of two matrix-vector
products a round (Schmitzer 2019, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.collectives import all_max, all_sum, gather_rows, row_counts
from deepclust.ops.precision import wide
from deepclust.ops.transport.shared import exp_

CHUNK_BYTES = (
    2_097_152  # of the kernel worked on at a time on a CPU, so that a round reads memory once
)
EASY_RANGE = 200.0  # of sharpness * benefit in a row: there scales of 1 are a good start
MEMORY = 8  # differences that Anderson's mixing keeps
FARTHEST = 100.0  # of an extrapolated move, in plain steps
ROUGH = 1e-3  # violation that will do on the way to the asked sharpness


def chunk_rows(num_clusters: int, device: torch.device) -> int:
    """Rows of a (rows, K) float64 chunk; a GPU takes all rows it can hold at once."""
    budget = CHUNK_BYTES if device.type == "cpu" else 128 * CHUNK_BYTES
    return max(1, budget // (8 * max(1, num_clusters)))


class Kernel:
    """exp(sharpness * benefit), rows of this rank, in chunks.

    chunks: a callable giving a fresh iterator of (rows, K) benefits (log-probabilities, minus
    costs), row order fixed; at least one chunk, which may have no rows. keep: store the kernel as
    (n, K) float64, else make it anew every round (memory for one chunk). After `shares` the fields
    `log_rows` (n,) and `log_virtual` describe that round.
    """

    def __init__(
        self, chunks: Callable[[], Iterable[Tensor]], keep: bool, group: Any, name: str
    ) -> None:
        self.chunks, self.keep, self.group = chunks, keep, group
        self.sharpness = 1.0
        self._survey(name)
        self.log_rows = torch.zeros(self.num_rows, dtype=self.dtype, device=self.device)
        self.log_virtual = 0.0
        self.absorbed = torch.zeros(self.num_clusters, dtype=self.dtype)
        self.stored: list[tuple[Tensor, Tensor]] = []

    def _survey(self, name: str) -> None:
        """One pass: sizes over all ranks, the largest range within a row, and whether all is
        finite.
        """
        rows, clusters, spread, bad = 0, 0, 0.0, []
        self.device, self.dtype = torch.device("cpu"), torch.float64
        for chunk in self.chunks():
            self.device, self.dtype = chunk.device, wide(chunk[:0]).dtype
            clusters = chunk.shape[1]
            if chunk.numel():
                ranges = wide(chunk.amax(1)) - wide(chunk.amin(1))
                bad += ((~ranges.isfinite()).nonzero().flatten()[:5] + rows).tolist()
                spread = max(spread, float(ranges.nan_to_num(posinf=0.0).amax()))
            rows += len(chunk)
        facts = all_max(
            torch.tensor([clusters, spread, len(bad)], dtype=self.dtype, device=self.device),
            self.group,
        )
        if facts[2] > 0:
            raise ValueError(
                f"{name}: NaN or infinite values; first bad rows of this rank: {bad[:5]}"
            )
        self.num_rows, self.num_clusters, self.range = rows, int(facts[0]), float(facts[1])
        self.total = sum(row_counts(rows, self.group, self.device))
        if self.total == 0 or self.num_clusters == 0:
            raise ValueError(
                f"{name}: {self.total} samples and {self.num_clusters} clusters; there must be both"
            )

    def _build(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(kernel (rows, K) with row maximum 1, log of what each row was divided by (rows,)) chunk
        by chunk.
        """
        absorbed = self.absorbed.to(self.dtype).to(self.device)
        for chunk in self.chunks():
            # laid out along the longer side: matrix-vector products along long lines take half the
            # time
            shape = chunk.shape if chunk.shape[1] > chunk.shape[0] else chunk.T.shape
            kernel = torch.empty(shape, dtype=self.dtype, device=self.device)
            kernel = kernel if shape == chunk.shape else kernel.T
            torch.add(absorbed, wide(chunk), alpha=self.sharpness, out=kernel)
            row_max = kernel.amax(1) if len(chunk) else kernel.new_zeros(0)
            yield exp_(kernel.sub_(row_max[:, None])), row_max

    def absorb(self, log_scale: Tensor, sharpness: float) -> None:
        """Moves the clusters' scales into the kernel: from here on exp(sharpness * benefit +
        log_scale).
        """
        self.absorbed, self.sharpness = log_scale.clone(), sharpness
        self.stored = list(self._build()) if self.keep else []

    def parts(self, log_scale: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows, kernel, row_max, scale (K,)) by chunk, kernel * scale being the kernel under
        `log_scale`.
        """
        # a quarter of the exponent's range: three such factors may meet in one product
        farthest = float(np.abs(log_scale.numpy() - self.absorbed.numpy()).max())
        if not self.keep or farthest > 0.25 * math.log(torch.finfo(self.dtype).max):
            self.absorb(log_scale, self.sharpness)
        scale = self._scale(log_scale)
        start = 0
        for kernel, row_max in self.stored if self.keep else self._build():
            yield slice(start, start + len(kernel)), kernel, row_max, scale
            start += len(kernel)

    def shares(self, log_scale: Tensor, mass: float = 1.0) -> Tensor:
        """(K,) float64 on the CPU: each cluster's share once the rows are scaled, summing to
        `mass`.

        Row sums are 1 (over the real and the virtual cluster, if mass < 1). The virtual cluster's
        scale is the one that makes the real clusters' total exactly `mass`: it is solved for, not
        iterated.
        """
        sums = torch.zeros(self.num_clusters, dtype=self.dtype, device=self.device)
        if mass < 1:
            for rows, kernel, row_max, scale in self.parts(log_scale):
                self.log_rows[rows] = (kernel @ scale).log_() + row_max
            self.log_virtual = self._solve_virtual(mass)
        for rows, kernel, row_max, scale in self.parts(log_scale):
            if mass < 1:
                weights = (row_max - torch.logaddexp(self.log_rows[rows], self._virtual())).exp_()
            else:
                row_sums = kernel @ scale
                weights = row_sums.reciprocal()
                self.log_rows[rows] = row_sums.log_() + row_max
            sums.addmv_(kernel.T, weights)
        return all_sum(sums * self._scale(log_scale) / self.total, self.group).cpu().double()

    def _scale(self, log_scale: Tensor) -> Tensor:
        """(K,) what of the clusters' scales is not in the kernel."""
        return (
            torch.from_numpy(np.exp(log_scale.numpy() - self.absorbed.numpy()))
            .to(self.dtype)
            .to(self.device)
        )

    def _virtual(self) -> Tensor:
        return self.log_rows.new_tensor(self.log_virtual)

    def _solve_virtual(self, mass: float) -> float:
        """y with mean sigmoid(y - log_rows) = 1 - mass over all ranks, each of which solves it for
        itself.
        """
        log_rows, _ = gather_rows(self.log_rows, self.group)
        return solve_virtual(log_rows, mass, self.log_virtual)


def solve_virtual(log_rows: Tensor, mass: float, guess: float) -> float:
    """y with mean sigmoid(y - log_rows (N,)) = 1 - mass: Newton on the log odds, inside a shrinking
    bracket.
    """
    odds = math.log1p(-mass) - math.log(mass)
    low, high = (odds + end for end in torch.stack(log_rows.aminmax()).tolist())
    eps = torch.finfo(log_rows.dtype).eps
    y = min(max(guess, low), high)
    for _ in range(100):
        virtual = torch.sigmoid(y - log_rows)
        share, slope = torch.stack([virtual.mean(), (virtual * (1 - virtual)).mean()]).tolist()
        low, high = (low, y) if share > 1 - mass else (y, high)
        if abs(share - (1 - mass)) <= 8 * eps or high - low <= eps * max(abs(low), abs(high)):
            break
        newton = math.nan
        if slope > 0 and 0 < share < 1:
            newton = y - (math.log(share) - math.log1p(-share) - odds) * share * (1 - share) / slope
        y = newton if low < newton < high else 0.5 * (low + high)
    return y


class Mixing:
    """Anderson's extrapolation of a fixed-point iteration x -> x + step (Walker and Ni 2011, type
    II).
    """

    def __init__(self) -> None:
        self.last: tuple[np.ndarray, np.ndarray] | None = None
        self.changes: list[tuple[np.ndarray, np.ndarray]] = []

    def next(self, x: np.ndarray, step: np.ndarray) -> np.ndarray:
        """(K,) float64: the next point; with no history, the plain x + step."""
        point, before = x + step, self.last
        self.last = point, step
        if before is None:
            return point
        self.changes = [*self.changes[1 - MEMORY :], (point - before[0], step - before[1])]
        point_changes, step_changes = (np.stack(part) for part in zip(*self.changes))
        normal = step_changes @ step_changes.T
        diagonal = np.einsum("ii->i", normal)
        diagonal += 1e-10 * diagonal.max() + np.finfo(normal.dtype).tiny
        move = step - np.linalg.solve(normal, step_changes @ step) @ point_changes
        return x + move * min(1.0, FARTHEST * np.abs(step).max() / (np.abs(move).max() + 1e-300))


@dataclass(frozen=True)
class Balance:
    """Scales (K,) on the CPU, the shares (K,) they give, rounds used, and what is left of the
    violation.
    """

    log_scale: Tensor
    shares: Tensor
    num_iters: int
    violation: float


def balance(
    kernel: Kernel,
    sharpness: float,
    log_target: Tensor,
    *,
    exponent: float = 1.0,
    mass: float = 1.0,
    tol: float,
    max_iters: int,
    log_scale: Tensor | None = None,
) -> Balance:
    """Scales under which the clusters' shares meet their targets (exponent 1) or give way to them
    (exponent < 1).

    log_target: (K,) logarithms of shares that sum to `mass`. exponent: kl_weight / (kl_weight +
    epsilon). violation: the share of the mass that one more update would move. Without a given
    `log_scale`, or where it leads nowhere, the
    sharpness is raised in steps, each starting from the scales of the one before: far fewer rounds
    where the kernel spans many decades.
    """
    rounds = 0
    if log_scale is not None:
        kernel.absorb(log_scale, sharpness)
        result = _rounds(kernel, log_scale, log_target, exponent, mass, tol, max_iters)
        rounds = result.num_iters
        if result.violation <= max(tol, ROUGH) or rounds == max_iters:
            return result
    log_scale, previous = torch.zeros_like(log_target), sharpness
    steps = math.ceil(math.log(max(1.0, kernel.range * sharpness / EASY_RANGE), 4))
    for level in (sharpness / 4**step for step in range(min(steps, 16), -1, -1)):
        last = level == sharpness
        kernel.absorb(log_scale * (level / previous), level)
        left = max_iters - rounds
        limits = (tol, max(1, left)) if last else (max(tol, ROUGH), max(1, min(50, left // 4)))
        result = _rounds(kernel, kernel.absorbed, log_target, exponent, mass, *limits)
        rounds, log_scale, previous = rounds + result.num_iters, result.log_scale, level
    return Balance(log_scale, result.shares, rounds, result.violation)


def _rounds(
    kernel: Kernel,
    log_scale: Tensor,
    log_target: Tensor,
    exponent: float,
    mass: float,
    tol: float,
    max_iters: int,
) -> Balance:
    mixing, best, scale, target = Mixing(), math.inf, log_scale.numpy(), log_target.numpy()
    plain_point = scale
    for round_number in range(1, max_iters + 1):
        shares = kernel.shares(torch.from_numpy(scale), mass).numpy()
        log_shares = np.log(np.maximum(shares, np.finfo(shares.dtype).tiny))
        step = exponent * (target - log_shares) - (1.0 - exponent) * scale
        # a common factor of all scales changes no plan: take the one under which the update keeps
        # the mass
        step -= _log_sum_exp(log_shares + step) - math.log(mass)
        violation = float(np.abs(np.exp(log_shares + step) - shares).sum()) / mass
        if violation <= tol or round_number == max_iters:
            break
        if (
            violation > 2 * best
        ):  # an extrapolation led astray: back to the best point, forget, take a plain step
            mixing, best, scale = Mixing(), math.inf, plain_point
            continue
        if violation < best:
            best, plain_point = violation, scale + step
        scale = mixing.next(scale, step)
    return Balance(torch.from_numpy(scale), torch.from_numpy(shares), round_number, violation)


def _log_sum_exp(x: np.ndarray) -> float:
    top = float(x.max())
    return top + math.log(float(np.exp(x - top).sum()))
