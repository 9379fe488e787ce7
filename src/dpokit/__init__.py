"""dpokit: Direct Preference Optimization on one to many GPUs."""

import logging

# bitsandbytes logs about a missing optional CPU kernel whenever it is imported, and PEFT always imports it. The level
# is set before both imports. Delete when bitsandbytes looks for the kernel only on use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
