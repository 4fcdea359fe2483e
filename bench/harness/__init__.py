"""Runs a workload against a server, and says what came of every request."""
