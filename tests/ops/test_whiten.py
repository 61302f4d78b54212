"""PCA whitening against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepclust.ops import pca_whiten


def correlated(num: int = 2000, dim: int = 10, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mixing + offset


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equals_scikit_learn_up_to_sign(offset: float) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = correlated(offset=offset)
    theirs = decomposition.PCA(4, whiten=True, svd_solver="full").fit_transform(x.numpy())
    ours = pca_whiten(x, 4).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-6)


def test_float32_is_white() -> None:
    white = pca_whiten(correlated(offset=100.0).float(), 6)
    assert white.dtype == torch.float32
    torch.testing.assert_close(white.T @ white / 1999, torch.eye(6), atol=1e-3, rtol=0)


def test_directions_without_variance_give_zeros() -> None:
    x = correlated(dim=4).float()
    white = pca_whiten(torch.cat([x, x], dim=1), 8)
    torch.testing.assert_close(white[:, :4].var(0), torch.ones(4), atol=1e-3, rtol=0)
    assert float(white[:, 4:].abs().max()) == 0


def test_chunks_agree_and_bad_input_is_refused() -> None:
    x = correlated().float()
    torch.testing.assert_close(
        pca_whiten([x[:300], x[300:].numpy()], 3), pca_whiten(x, 3), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="num_components=11"):
        pca_whiten(x, 11)
    with pytest.raises(ValueError, match="at least 2 rows"):
        pca_whiten(x[:1], 1)
    x[3, 3] = float("nan")
    with pytest.raises(ValueError, match="rows 3 hold"):
        pca_whiten(x, 3)
