"""The Tinker API: its routes, and the translation of its messages to Lorry's words and back."""
