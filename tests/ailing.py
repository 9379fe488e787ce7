"""dpokit with a model that is slow at each token, and that runs out of memory at one of its answers.

Environment variables: AILING_SECONDS, the time of each step; AILING_ANSWER, the number of the answer that runs out of
memory, from 1; AILING_PATIENCE, seconds that replace the page server's time-outs for a request, a reader and a session.
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


@wraps(forward)  # transformers inspects its parameters
def slow_forward(self, *args, **kwargs):
    time.sleep(SECONDS)
    return forward(self, *args, **kwargs)


GPT2LMHeadModel.generate, GPT2LMHeadModel.forward = ailing_generate, slow_forward

if PATIENCE:
    from dpokit.serve import connections, sessions

    connections.REQUEST_SECONDS = connections.WRITE_SECONDS = sessions.UNREAD_SECONDS = PATIENCE

if __name__ == "__main__":
    main()
