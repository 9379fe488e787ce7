"""Release: merge, card, push."""
