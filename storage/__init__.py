"""Jobs, usage and checkpoint metadata in one SQLite file. Knows rows, never sockets, schedules or models."""
