"""Anthropic's API: messages, and how many tokens they are, over samplers of the broker."""
