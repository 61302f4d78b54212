"""A run of training: recipe, stages, steps, resume and results."""
