"""The verbs of `dpokit`, a file for each time of a run's life: before and while, proof, release, search."""
