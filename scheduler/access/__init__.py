"""Who may come in, and do what: keys, scopes, sessions, and what administrators order."""
