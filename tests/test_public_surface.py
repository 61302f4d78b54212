"""The names that users may rely on. Signatures may grow keyword arguments; none of these may go."""

from __future__ import annotations

import importlib
import inspect

import pytest

SURFACE = {
    "deepclust": {"DeepClusterer", "Clusterer", "Trainer"},
    "deepclust.heads": {"Head", "View", "Output", "Targets", "BankSpec", "Refresh"},
    "deepclust.ops": {
        "KMeans",
        "kmeans",
        "hierarchical_kmeans",
        "balanced_sample",
        "sinkhorn",
        "self_label",
        "partial_transport",
        "semantic_partial_transport",
        "mass_schedule",
        "knn",
        "pca_whiten",
    },
    "deepclust.eval": {"calibration_scores", "clustering_scores", "knn_probe", "linear_probe"},
}

SIGNATURES = {
    "deepclust.ops.kmeans": "x num_clusters init num_iters tol num_restarts spherical empty sample_weights chunk_size "
    "seed group",
    "deepclust.ops.hierarchical_kmeans": "x num_clusters seed",
    "deepclust.ops.balanced_sample": "tree count seed",
    "deepclust.ops.sinkhorn": "scores epsilon num_iters column_marginal group",
    "deepclust.ops.self_label": "log_probs power tol stop group",
    "deepclust.ops.partial_transport": "logits mass kl_weight epsilon tol max_iters warm_start group",
    "deepclust.ops.semantic_partial_transport": "logits similarity mass similarity_weight kl_weight epsilon",
    "deepclust.ops.mass_schedule": "step num_steps start end shape",
    "deepclust.ops.knn": "queries bank k metric exclude_self group",
    "deepclust.ops.pca_whiten": "x num_components group",
    "deepclust.eval.calibration_scores": "probabilities target predicted num_bins",
    "deepclust.eval.clustering_scores": "predicted target",
    "deepclust.DeepClusterer": "n_clusters recipe backbone random_state",
}


@pytest.mark.parametrize("module", SURFACE)
def test_the_public_names_are_exactly_these(module):
    package = importlib.import_module(module)
    assert set(package.__all__) == SURFACE[module]
    for name in SURFACE[module]:
        assert getattr(package, name).__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_keep_their_names(path):
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert set(SIGNATURES[path].split()) <= set(parameters)


def test_an_unknown_name_is_an_attribute_error():
    for module in SURFACE:
        with pytest.raises(AttributeError):
            _ = importlib.import_module(module).nothing_of_the_kind
