"""Compares base and tuned model on held-out pairs, with intervals, and by sampled answers and a judge."""
