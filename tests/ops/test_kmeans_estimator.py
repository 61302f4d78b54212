"""The scikit-learn estimator passes scikit-learn's own checks."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans as Theirs
from sklearn.utils.estimator_checks import parametrize_with_checks

from deepclust.ops import KMeans
from tests.ops.test_kmeans import mixture

SKIPPED = {
    # Another set of rows draws another start, as with scikit-learn's own KMeans; from one start the
    # two are equal.
    "check_sample_weight_equivalence_on_dense_data": "the random start depends on the number of rows",
}


@parametrize_with_checks([KMeans()], expected_failed_checks=lambda _: SKIPPED)
def test_scikit_learn_checks(estimator, check) -> None:
    check(estimator)


def test_agrees_with_scikit_learn() -> None:
    x = mixture(500, 6, 8).numpy()
    ours, theirs = KMeans(8, init=x[:8]).fit(x), Theirs(8, init=x[:8], n_init=1).fit(x)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-3)
    np.testing.assert_allclose(ours.transform(x[:3]), theirs.transform(x[:3]), atol=1e-3)
    assert np.array_equal(ours.predict(x[:3]), theirs.predict(x[:3]))
    assert np.isclose(ours.score(x), theirs.score(x), rtol=1e-4)


def test_spherical_predicts_by_direction() -> None:
    x = mixture(300, 6, 5).numpy()
    fitted = KMeans(5, spherical=True).fit(x)
    assert np.array_equal(fitted.predict(7 * x), fitted.labels_)
    assert np.array_equal(fitted.transform(x).argmin(1), fitted.labels_)


def test_weights_equal_repeated_rows() -> None:
    x = mixture(200, 4, 5, spread=2.0).numpy()
    times = np.random.default_rng(0).integers(0, 4, len(x))
    weighted = KMeans(5, init=x[:5]).fit(x, sample_weight=times)
    repeated = KMeans(5, init=x[:5]).fit(np.repeat(x, times, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_, atol=1e-4)
