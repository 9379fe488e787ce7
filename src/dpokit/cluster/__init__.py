"""A run on a cluster: what Slurm is told, what becomes of a run that ended, what its folder says."""
