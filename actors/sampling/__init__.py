"""One decode step of many sequences: who joins, what is cached, which token comes next. Knows no socket or gradient."""
