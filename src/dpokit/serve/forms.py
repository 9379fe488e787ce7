"""The names and JSON bodies that the page sends; the server refuses all others. No torch."""

import re
from collections.abc import Mapping
from typing import Any

NAME = re.compile(r"[\w-]{1,64}", re.ASCII)  # the name of a session or an event
JOIN, CANCEL, RESET = (f"/gradio_api/{path}" for path in ("queue/join", "cancel", "reset"))
KEYS = {
    JOIN: ({"data", "fn_index", "session_hash"}, {"trigger_id", "event_data", "event_id"}),
    CANCEL: ({"session_hash", "fn_index", "event_id"}, set()),
    RESET: ({"event_id"}, set()),
}
MOST_NUMBER = 2**31


def is_name(value: Any) -> bool:
    """Whether the value is a valid name of a session or an event."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


class Forms:
    """Checks bodies against the forms that the page sends.

    Args:
        inputs: the number of inputs of each function of the page, by the function's number.
    """

    def __init__(self, inputs: Mapping[int, int]) -> None:
        self._inputs = dict(inputs)

    def fits(self, path: str, body: Mapping[str, Any]) -> bool:
        """Whether a body, a JSON object whose `data` holds plain values, has the form for this path."""
        needed, allowed = KEYS[path]
        if not needed <= body.keys() <= needed | allowed:
            return False
        if not all(is_name(body[key]) for key in ("session_hash", "event_id") if key in needed):
            return False
        number = body.get("fn_index")
        if "fn_index" in needed and (type(number) is not int or number not in self._inputs):
            return False
        if path != JOIN:
            return True
        trigger = body.get("trigger_id")
        return (
            len(body["data"]) == self._inputs[body["fn_index"]]
            and (trigger is None or (type(trigger) is int and 0 <= trigger < MOST_NUMBER))
            and body.get("event_id") is None
            and body.get("event_data") is None
        )
