"""A client of the page without a browser: like the page's script, it joins Gradio's queue and reads the events."""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import httpx

SETTINGS = (0.7, 0.95, 16, 0)


class Asker:
    """One session of the page."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url, self.session = url, secrets.token_hex(5)
        self.client = httpx.Client(base_url=url, timeout=120, trust_env=False, **options)
        self.config = self.client.get("/config").raise_for_status().json()
        self.ids = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}

    def find_function(self, elem_id: str, event: str = "click") -> int:
        target = [self.ids[elem_id], event]
        return next(function["id"] for function in self.config["dependencies"] if target in function["targets"])

    def join(self, function: Any, data: Any, **more: Any) -> httpx.Response:
        body = {"data": data, "fn_index": function, "session_hash": self.session, "event_data": None, **more}
        return self.client.post(
            "/gradio_api/queue/join",
            content=json.dumps(body, ensure_ascii=True),
            headers={"content-type": "application/json"},
        )

    def events(self) -> Iterator[dict[str, Any]]:
        """The events that the server sends to this session, until its request is complete."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    yield event
                    if event["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                        return

    def ask(self, question: Any, *, settings: Any = SETTINGS, blind: Any = False, goes_on: Any = "Right") -> list[dict]:
        """Every event of a question, each with its time of arrival as `at`."""
        data = [question, *settings, blind, goes_on, None]
        joined = self.join(self.find_function("ask"), data)
        if joined.status_code != 200:
            return [{"msg": "refused", "status": joined.status_code, "text": joined.text, "at": time.time()}]
        return [event | {"at": time.time()} for event in self.events()]

    def press(self, elem_id: str, *data: Any) -> list[dict]:
        """Every event of a button."""
        self.join(self.find_function(elem_id), list(data)).raise_for_status()
        return list(self.events())


def read_text(events: list[dict]) -> str:
    """All events as one JSON text."""
    return json.dumps(events)
