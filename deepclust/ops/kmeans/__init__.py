"""Exact k-means: `fit.py` is the way in, `lloyd.py` the loop, `step.py` one assignment and update."""
