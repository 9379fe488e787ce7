"""How dpokit starts another Python. No torch."""

import sys

# Modules are never taken from the working folder, which may be a stranger's: a torch.py there would be imported.
PYTHON = (sys.executable, "-P")
