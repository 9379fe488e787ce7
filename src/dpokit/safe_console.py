"""A rich console for untrusted text. No torch."""

from typing import Any

from rich.console import Console
from rich.text import Text

from dpokit.terminal import escape_controls


class SafeConsole(Console):
    r"""Shows control characters of a text as escapes like `\x1b`; only rich itself writes control sequences."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_controls(text), **options)
