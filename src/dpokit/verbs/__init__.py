"""The verbs of `dpokit`: runs, evaluation, publishing, sweeps, and talking to a model."""
