"""Tries a model's chat template in a child process with limits of time and memory, because a template is a program.

Jinja's sandbox keeps a template from files and functions, but not from endless loops and texts. Each later conversation
has a limit of time and of characters, but not of memory.
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

from dpokit.data.messages import Messages, count_letters
from dpokit.errors import ModelError

CPU_SECONDS, MEMORY_BYTES = 3, 2**30
WAIT_SECONDS = 30.0  # for a busy machine; a child that waits for a lock uses no CPU time
MOST_LETTERS = 100_000  # characters of a rendered probe
CONVERSATION_SECONDS = 10.0  # of this process's CPU time
MOST_EXPANSION = 10  # rendered characters for each character of a conversation, beside MOST_LETTERS

QUESTION: Messages = [{"role": "user", "content": "probe question"}]
PROBES: tuple[Messages, ...] = (
    QUESTION,
    [*QUESTION, {"role": "assistant", "content": "probe answer"}],
    [{"role": "system", "content": "probe"}, *QUESTION, {"role": "assistant", "content": "probe answer"}, *QUESTION],
)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError, with the template's name, if rendering a question fails or does not end.

    A child process renders. If it blocks on a lock that this process held, the result is unknown and nothing is raised.
    """

    def render(messages: Messages) -> int:
        return len(str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))

    trouble = _run_in_child(render)
    if trouble is not None:
        raise refuse_template(tokenizer, trouble)


def render_in_bounds(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    """Returns the text of `apply_chat_template`. Raises: ModelError if the template takes too long or writes too much.

    Time is limited only in a process's main thread, where a timer can interrupt the template.
    """

    def stop(*_: object) -> Never:
        raise refuse_template(tokenizer, f"takes more than {CONVERSATION_SECONDS:g} s for one conversation")

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
    size = count_letters(messages) + count_letters(options.get("tools") or [])
    if len(text) > MOST_LETTERS + MOST_EXPANSION * size:
        raise refuse_template(tokenizer, f"makes a text of {len(text):,} characters of a conversation of {size:,}")
    return text


def refuse_template(tokenizer: PreTrainedTokenizerBase, trouble: str) -> ModelError:
    """Returns the error for a chat template that `trouble` describes."""
    return ModelError(
        f"the chat template of {tokenizer.name_or_path} {trouble}",
        expected="a template that renders user and assistant turns in a moment, named default if there are several",
        do="correct chat_template.jinja (or chat_template in tokenizer_config.json), or use another model",
    )


def _run_in_child(render: Callable[[Messages], int]) -> str | None:
    """Renders in a child process; returns what is wrong as text, or None."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of forks beside threads: see WAIT_SECONDS
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
    """Returns the child's status; kills a child that does not end and returns None."""
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
    """Runs in the child: renders each probe, writes what is wrong, and exits without the parent's clean-up.

    A template may refuse some of the probes, such as those without a system turn, but not all.
    """
    trouble, refusal, is_rendered = "", "", False
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
        for probe in PROBES:
            try:
                length = render(probe)
                is_rendered = True
            except MemoryError:
                trouble = f"takes more than {MEMORY_BYTES / 2**30:g} GiB"
            except Exception as error:
                length = 0
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                refusal = refusal or f"cannot be rendered: {reason}"
            if not trouble and length > MOST_LETTERS:
                trouble = f"makes a text of {length:,} characters of a question of two words"
            if trouble:
                break
        os.write(writing, (trouble or ("" if is_rendered else refusal)).encode(errors="replace"))
    finally:
        os._exit(0)
