"""Benchmarks: how fast deepclust computes (`speed`) and how well it clusters (`quality`).

Run them from the root of a checkout, as modules: `python -m benchmarks.speed.ops --help`. Each file
begins with what it measures, against what, and the command that printed the committed figures.
"""
