"""Chat with base and tuned model side by side, in the browser or the terminal; votes become pairs to train on."""

import os

# Gradio reads this at import; without it, Gradio reports every start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
