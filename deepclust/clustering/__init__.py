"""Clustering of features without training: methods, the choice between them, the number of
clusters, baselines.
"""
