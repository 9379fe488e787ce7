"""A chat template is a program that comes with a model: it is tried in a child process with little time and memory.

Jinja's sandbox keeps a template from files and functions, but not from loops and texts without end.
"""

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Never

from transformers import PreTrainedTokenizerBase

from dpokit.data.formats import Messages
from dpokit.errors import ModelError

CPU_SECONDS, MEMORY_BYTES = 3, 2**30
WAIT_SECONDS = 30.0  # on a busy machine; a child that waits for a lock uses no time of the processor
MOST_LETTERS = 100_000  # of a rendered probe

QUESTION: Messages = [{"role": "user", "content": "probe question"}]
# A template may refuse the longer ones: not every model has system turns.
PROBES: tuple[Messages, ...] = (
    QUESTION,
    [*QUESTION, {"role": "assistant", "content": "probe answer"}],
    [{"role": "system", "content": "probe"}, *QUESTION, {"role": "assistant", "content": "probe answer"}, *QUESTION],
)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError, which names the template, where rendering a question fails or has no end.

    A child process renders; where it cannot begin, for a lock that this process held, nothing is known and nothing is
    raised.
    """

    def render(messages: Messages) -> int:
        return len(str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))

    trouble = _run_boxed(render)
    if trouble is not None:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} {trouble}",
            expected="a template that renders a conversation in a moment",
            do="correct chat_template.jinja (or chat_template in tokenizer_config.json), or use another model",
        )


def _run_boxed(render: Callable[[Messages], int]) -> str | None:
    """What is wrong with rendering, in words; None where nothing is."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, on forks beside threads: see WAIT_SECONDS
        child = os.fork()
    if child == 0:
        _render(render, writing)
    os.close(writing)
    status = _wait(child)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read(4096).decode(errors="replace") if status is not None else ""
    if status is None:
        return None
    if os.WIFSIGNALED(status):
        return f"takes more than {CPU_SECONDS} s, or ends its process"
    return text or None


def _wait(child: int) -> int | None:
    """The child's status; None where it stood still and was ended."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _render(render: Callable[[Messages], int], writing: int) -> Never:
    """In the child: renders each probe, writes what goes wrong, and ends without any of the parent's clean-up."""
    trouble = ""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
        for probe in PROBES:
            try:
                length = render(probe)
            except MemoryError:
                trouble = f"takes more than {MEMORY_BYTES / 2**30:g} GiB"
            except Exception as error:
                length = 0
                if probe is QUESTION:
                    trouble = f"cannot be rendered: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if not trouble and length > MOST_LETTERS:
                trouble = f"makes a text of {length:,} letters of a question of two words"
            if trouble:
                break
        os.write(writing, trouble.encode(errors="replace"))
    finally:
        os._exit(0)
