"""Rich's console for texts of others. No torch."""

from typing import Any

from rich.console import Console
from rich.text import Text

from dpokit.terminal import escape_controls


class SafeConsole(Console):
    """Shows control characters in a text as letters; only rich itself writes control sequences."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_controls(text), **options)
