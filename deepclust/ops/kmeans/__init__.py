"""Exact k-means: start at `fit.py`; `lloyd.py` has the loop, `step.py` one pass over the rows."""
