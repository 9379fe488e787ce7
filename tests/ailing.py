"""dpokit with a model that takes its time over each token, and has no memory left for one of its answers.

AILING_SECONDS: of each step. AILING_ANSWER: which answer finds no memory, counted from 1. AILING_PATIENCE: seconds that
the page's server waits for a request, a reader and a session's stream, instead of its own.
"""

import os
import time
from functools import wraps

import torch
from transformers import GPT2LMHeadModel

from dpokit.cli import main

SECONDS = float(os.environ.get("AILING_SECONDS", "0"))
ANSWER = int(os.environ.get("AILING_ANSWER", "0"))
PATIENCE = float(os.environ.get("AILING_PATIENCE", "0"))
generate, forward = GPT2LMHeadModel.generate, GPT2LMHeadModel.forward
begun = 0


def ailing_generate(self, *args, **kwargs):
    global begun
    begun += 1
    if begun == ANSWER:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return generate(self, *args, **kwargs)


@wraps(forward)  # transformers looks at what it takes
def slow_forward(self, *args, **kwargs):
    time.sleep(SECONDS)
    return forward(self, *args, **kwargs)


GPT2LMHeadModel.generate, GPT2LMHeadModel.forward = ailing_generate, slow_forward

if PATIENCE:
    from dpokit.serve import connections, sessions

    connections.REQUEST_SECONDS = connections.WRITE_SECONDS = sessions.UNREAD_SECONDS = PATIENCE

if __name__ == "__main__":
    main()
