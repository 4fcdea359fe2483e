"""The HTTP server that the official Tinker SDK talks to: a client of the broker, without any state of its own."""
