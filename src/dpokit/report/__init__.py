"""A run, or several, on one page: read from their folders, drawn, told in a sentence."""
