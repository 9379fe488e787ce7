"""A chat template is a program that comes with a model: it is tried in a child process with little time and memory.

Jinja's sandbox keeps a template from files and functions, but not from loops and texts without end. Later conversations
have a limit of time and of letters each; of memory they have none.
"""

import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

from transformers import PreTrainedTokenizerBase

from dpokit.data.formats import Messages
from dpokit.errors import ModelError

CPU_SECONDS, MEMORY_BYTES = 3, 2**30
WAIT_SECONDS = 30.0  # on a busy machine; a child that waits for a lock uses no time of the processor
MOST_LETTERS = 100_000  # of a rendered probe
CONVERSATION_SECONDS = 10.0  # of this process's time
MOST_EXPANSION = 10  # letters of a rendered conversation for each of its own, beside MOST_LETTERS

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
        raise _refuse(tokenizer, trouble)


def render_in_bounds(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    """`apply_chat_template`'s text. Raises: ModelError where the template takes too long or writes too much.

    Time is bounded in a process's main thread alone, where a timer can interrupt the template.
    """

    def stop(*_: object) -> Never:
        raise _refuse(tokenizer, f"takes more than {CONVERSATION_SECONDS:g} s for one conversation")

    is_timed = threading.current_thread() is threading.main_thread()
    if is_timed:
        before = signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, CONVERSATION_SECONDS)
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    finally:
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
    own = sum(len(message["content"]) for message in messages)
    if len(text) > MOST_LETTERS + MOST_EXPANSION * own:
        raise _refuse(tokenizer, f"makes a text of {len(text):,} letters of a conversation of {own:,}")
    return text


def _refuse(tokenizer: PreTrainedTokenizerBase, trouble: str) -> ModelError:
    return ModelError(
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
