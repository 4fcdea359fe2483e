"""Images in training rows and prompts: read from files nobody trusts, seen by the model's own frozen tower."""
