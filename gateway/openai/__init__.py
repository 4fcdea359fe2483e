"""OpenAI's API: models, completions and chat completions, over samplers of the broker."""
