"""The command with which dpokit starts another Python. No torch."""

import sys

# -P: no module is imported from the working folder, where a stranger may have put a torch.py.
PYTHON = (sys.executable, "-P")
