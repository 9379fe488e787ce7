"""What a request may look like: names, queries and JSON bodies, each as the page sends them. No torch."""

import re
from collections.abc import Mapping
from typing import Any

NAME = re.compile(r"[\w-]{1,64}", re.ASCII)  # of a session or an event
JOIN, CANCEL, RESET = (f"/gradio_api/{path}" for path in ("queue/join", "cancel", "reset"))
KEYS = {
    JOIN: ({"data", "fn_index", "session_hash"}, {"trigger_id", "event_data", "event_id"}),
    CANCEL: ({"session_hash", "fn_index", "event_id"}, set()),
    RESET: ({"event_id"}, set()),
}
MOST_NUMBER = 2**31


def is_name(value: Any) -> bool:
    """Whether it can name a session or an event."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


class Forms:
    """The bodies that the page sends.

    Args:
        inputs: how many values each of its functions takes, by number.
    """

    def __init__(self, inputs: Mapping[int, int]) -> None:
        self._inputs = dict(inputs)

    def fits(self, path: str, sent: Mapping[str, Any]) -> bool:
        """Whether a body, a JSON object whose `data` holds plain values, is one of them."""
        needed, allowed = KEYS[path]
        if not needed <= sent.keys() <= needed | allowed:
            return False
        if not all(is_name(sent[key]) for key in ("session_hash", "event_id") if key in needed):
            return False
        number = sent.get("fn_index")
        if "fn_index" in needed and (type(number) is not int or number not in self._inputs):
            return False
        if path != JOIN:
            return True
        trigger = sent.get("trigger_id")
        return (
            len(sent["data"]) == self._inputs[sent["fn_index"]]
            and (trigger is None or (type(trigger) is int and 0 <= trigger < MOST_NUMBER))
            and sent.get("event_id") is None
            and sent.get("event_data") is None
        )
