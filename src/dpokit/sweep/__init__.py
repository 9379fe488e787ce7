"""Searches: many runs of one recipe, each its own processes, ranked at the end."""
