"""Did it get better? Base beside tuned on held-out pairs, each number with its interval; their answers; a judge."""
