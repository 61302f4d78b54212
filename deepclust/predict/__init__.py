"""Clusters of new images with the model of a run."""
