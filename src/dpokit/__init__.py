"""dpokit: Direct Preference Optimization on one to many GPUs, with proof."""

import logging

# bitsandbytes looks for an optional CPU kernel whenever it is imported, and PEFT always imports it. Said here, before
# either is; delete when bitsandbytes asks only on use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
