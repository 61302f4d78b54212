"""Eigenvectors of symmetric matrices, by one solver after another until one of them succeeds.

LAPACK's divide and conquer fails on some matrices with many equal eigenvalues, ARPACK on tight
clusters of them; and ARPACK, a Krylov space from a single start, may leave out copies of an
eigenvalue without a word. What is found here is checked, and the next solver is asked where it is
not what it should be. The first solver is the usual one, so that the others change nothing where it
succeeds. Everything repeats: no start is random but for its fixed seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_DENSE = 6000
"""Rows up to which a sparse matrix is made dense (0.3 GB) where ARPACK fails."""
ACCURATE = 1e-6
"""Residual and loss of orthogonality, relative to the largest eigenvalue, that count as solved:
ARPACK's are 1e-14.
"""
CLOSE_ENOUGH = 1e-4
"""The residual that is accepted of the last resort: within a tight cluster of eigenvalues any
vectors will do.
"""
MISSED = 1e-6
"""By how much an eigenvalue must exceed the least of those found, relative to the largest, to count
as left out.
"""
PROBES = 30
"""Steps of the search for what was left out."""

NOT_FINITE = (
    "matrix: NaN or infinite entries, which have no eigenvectors; the features hold some too"
)

Pairs = tuple[np.ndarray, np.ndarray]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), ascending, and eigenvectors (D, D) in columns, of a symmetric matrix:
    `torch.linalg.eigh`.

    matrix: (D, D) float32 or float64, on any device. Where that fails, other algorithms on the
    processor are asked. Raises ValueError for NaN and infinity, which have no eigenvectors.
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError(NOT_FINITE)
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if bool(vectors.isfinite().all()):
            return values, vectors
    except RuntimeError:  # LinAlgError is one
        pass
    values, vectors = dense(matrix.cpu().double().numpy())
    return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)


def dense(matrix: np.ndarray) -> Pairs:
    """The same of a float64 array: `numpy.linalg.eigh`, then QR iteration, then that with a tiny
    ramp as a ridge.
    """
    from scipy import linalg

    if not np.isfinite(matrix).all():
        raise ValueError(NOT_FINITE)
    # Unequal on purpose: equal additions would leave equal eigenvalues equal.
    ramp = (
        np.finfo(matrix.dtype).eps
        * max(float(np.abs(matrix).max(initial=0)), 1e-300)
        * np.arange(len(matrix))
    )
    attempts: list[Callable[[], Pairs]] = [
        lambda: np.linalg.eigh(matrix),
        lambda: linalg.eigh(matrix, driver="ev"),
        lambda: linalg.eigh(matrix + np.diag(ramp), driver="ev"),
    ]
    for attempt in attempts:
        try:
            values, vectors = attempt()
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(vectors).all():
            return values, vectors
    raise np.linalg.LinAlgError(
        f"no algorithm finds the eigenvectors of this {matrix.shape} matrix"
    )


def principal_scores(x: np.ndarray, num: int) -> np.ndarray:
    """(N, C) float64: rows (N, D) in their C leading principal directions, centred, largest
    variance first.

    scikit-learn's PCA, whose singular value decomposition may fail where the eigenvectors of the
    smaller of the two products do not.
    """
    from sklearn.decomposition import PCA

    values = x.astype(np.float64)
    try:
        return PCA(num, svd_solver="full").fit_transform(values)
    except np.linalg.LinAlgError:
        centred = values - values.mean(0)
    if len(centred) < centred.shape[1]:
        squares, vectors = dense(centred @ centred.T)
        return (vectors * np.sqrt(squares.clip(0)))[:, ::-1][:, :num]
    return centred @ dense(centred.T @ centred)[1][:, ::-1][:, :num]


def leading(matrix: Any, num: int, start: np.ndarray | None = None) -> Pairs:
    """The largest eigenvalues (m,), descending, and their eigenvectors (N, m), of a sparse
    symmetric matrix (N, N).

    matrix: sparse, or a LinearOperator; float64. num: m, from 1 to N. start: (N,) where ARPACK
    begins, by default random numbers of a fixed seed. Raises ValueError for other numbers, and for
    entries that are not finite; LinAlgError where no solver succeeds.
    """
    size = matrix.shape[0]
    if not 1 <= num <= size:
        raise ValueError(
            f"num={num} eigenvectors: choose from 1 to {size}, the matrix is {size} x {size}"
        )
    probe = _random(size)
    product = matrix @ probe
    if not np.isfinite(product).all():
        raise ValueError(NOT_FINITE)
    scale = float(np.linalg.norm(product) / np.linalg.norm(probe))
    for attempt, tolerance in _attempts(matrix, num, start):
        try:
            values, vectors = attempt()
        except (
            RuntimeError,
            np.linalg.LinAlgError,
            ValueError,
        ):  # ARPACK's and LAPACK's; LOBPCG's are of all kinds
            continue
        order = np.argsort(-values)[:num]
        values, vectors = values[order], vectors[:, order]
        if _solved(matrix, values, vectors, scale, tolerance):
            return values, vectors
    raise np.linalg.LinAlgError(
        f"no solver finds {num} leading eigenvectors of this {size} x {size} matrix"
    )


def _attempts(
    matrix: Any, num: int, start: np.ndarray | None
) -> list[tuple[Callable[[], Pairs], float]]:
    """What is asked in turn, and the residual that is accepted of it."""
    size = matrix.shape[0]
    attempts: list[tuple[Callable[[], Pairs], float]] = []
    # An eigenvector spans no Krylov space: ARPACK would go on from one of its own, another one in
    # every call.
    usual = _random(size) if start is None or _is_eigenvector(matrix, start) else start
    if num < size:
        attempts.append((lambda: _arpack(matrix, num, usual), ACCURATE))
    if size <= MAX_DENSE:
        return [*attempts, (lambda: _as_dense(matrix, num), ACCURATE)]
    # A larger space, from elsewhere, gets past most of what stops ARPACK; LOBPCG looks for all
    # vectors at a time.
    attempts.append((lambda: _arpack(matrix, num, _random(size), 4 * num + 40), ACCURATE))
    return [*attempts, (lambda: _lobpcg(matrix, num), CLOSE_ENOUGH)]


def _random(size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=size)


def _is_eigenvector(matrix: Any, start: np.ndarray) -> bool:
    product = matrix @ start
    rest = product - start * (float(start @ product) / max(float(start @ start), 1e-300))
    return float(np.abs(rest).max()) <= 1e-12 * float(np.abs(product).max())


def _arpack(matrix: Any, num: int, start: np.ndarray, space: int | None = None) -> Pairs:
    from scipy.sparse.linalg import eigsh

    options: dict[str, Any] = {"v0": start}
    if space is not None:
        options["ncv"] = min(space, matrix.shape[0])
    if (
        "rng" in inspect.signature(eigsh).parameters
    ):  # since SciPy 1.17; it draws new starts where a space is used up
        options["rng"] = 0
    found: Any = eigsh(matrix, k=num, which="LA", **options)
    return found


def _as_dense(matrix: Any, num: int) -> Pairs:
    """All of it, in LAPACK's hands; the part that is wanted, where it finds that."""
    from scipy import linalg

    size = matrix.shape[0]
    whole = matrix.toarray() if hasattr(matrix, "toarray") else matrix @ np.eye(size)
    whole = (whole + whole.T) / 2
    try:
        found: Any = linalg.eigh(whole, subset_by_index=[size - num, size - 1])
        return found
    except np.linalg.LinAlgError:
        values, vectors = dense(whole)
        return values[-num:], vectors[:, -num:]


def _lobpcg(matrix: Any, num: int) -> Pairs:
    """Knyazev's (2001) block method from a random block, with more vectors than wanted: the last
    ones settle last.
    """
    from scipy.sparse.linalg import lobpcg

    block = np.random.default_rng(0).normal(size=(matrix.shape[0], num + min(num, 10)))
    values, vectors, *_ = lobpcg(matrix, block, largest=True, tol=1e-8, maxiter=1000)
    return values, vectors


def _solved(
    matrix: Any, values: np.ndarray, vectors: np.ndarray, scale: float, tolerance: float
) -> bool:
    """Whether these are orthonormal eigenvectors, and the leading ones."""
    if not np.isfinite(vectors).all():
        return False
    scale = max(scale, float(np.abs(values).max()))
    residual = np.abs(matrix @ vectors - vectors * values).max()
    skew = np.abs(vectors.T @ vectors - np.eye(len(values))).max()
    if residual > tolerance * scale or skew > tolerance:
        return False
    return _largest_left(matrix, vectors) <= float(values.min()) + max(MISSED, tolerance) * scale


def _largest_left(matrix: Any, known: np.ndarray) -> float:
    """A lower bound, mostly a close one, of the largest eigenvalue but for those of known vectors
    (N, m).

    That of a Krylov space orthogonal to them: Lanczos' method, every vector made orthogonal to all
    before it.
    """
    size = len(known)
    steps = min(PROBES, size - known.shape[1])
    basis, products = np.zeros((size, steps)), np.zeros((size, steps))
    following = np.random.default_rng(1).normal(size=size)
    found = 0
    while found < steps:
        before = basis[:, :found]
        for _ in range(2):  # rounding leaves something the first time, and nothing the second
            following = following - known @ (known.T @ following) - before @ (before.T @ following)
        length = float(np.linalg.norm(following))
        if length < 1e-10:
            break
        basis[:, found] = following / length
        products[:, found] = following = matrix @ basis[:, found]
        found += 1
    inner = basis[:, :found].T @ products[:, :found]
    return float(np.linalg.eigvalsh((inner + inner.T) / 2).max(initial=-np.inf))
