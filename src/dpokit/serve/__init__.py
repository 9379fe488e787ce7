"""Talking to what was trained: base beside tuned in the browser and the terminal, and votes that become pairs."""

import os

# Gradio reads it when it is imported, and would tell its makers of every start.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
