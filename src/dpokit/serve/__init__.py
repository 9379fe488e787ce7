"""Chat with base and tuned model side by side, in the browser or the terminal; votes become pairs to train on."""
