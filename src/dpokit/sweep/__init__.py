"""Hyperparameter searches: many runs of one recipe, each in its own processes, ranked at the end."""
