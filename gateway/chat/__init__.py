"""What the APIs of text have in common: conversations as text and tokens, what a model says as text and calls."""
