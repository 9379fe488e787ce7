"""Bytes of optimizer state for each parameter, by the name of `--optim`."""

import math
from typing import Any

# (part of the name in transformers, state tensors of the weight's shape, bytes per number; 0: as the weight).
# AdamW keeps a first and a second moment (arXiv 1711.05101), Lion one (arXiv 2302.06675), Adafactor sums of rows and
# columns (arXiv 1804.04235); 8-bit states have one fp32 scale for 256 numbers (arXiv 2110.02861).
STATES = (
    ("adafactor", 0, 0),
    ("lion_8bit", 1, 1),
    ("lion", 1, 0),
    ("sgd", 0, 0),
    ("rmsprop", 1, 0),
    ("adagrad", 1, 0),
    ("8bit", 2, 1),
    ("32bit", 2, 4),
)
BLOCK = 256


def count_state_bytes(optim: Any, weight: Any) -> int:
    """Returns the bytes of state of one weight: for names not in `STATES`, AdamW's two moments in the weight's dtype.

    bitsandbytes keeps the states of tensors of fewer than 4,096 numbers in 32 bit (`min_8bit_size`).
    """
    name = str(getattr(optim, "value", optim))
    numbers = weight.numel()
    for part, tensors, size in STATES:
        if part in name:
            if size == 1 and numbers < 4096:
                return int(tensors * 4 * numbers)
            scales = 4 * math.ceil(numbers / BLOCK) if size == 1 else 0
            return int(tensors * ((size or weight.element_size()) * numbers + scales))
    return int(2 * weight.element_size() * numbers)
