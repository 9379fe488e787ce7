"""Runs under Slurm: the job script, the arguments of the launcher, and the state of a run and its next start."""
