"""What goes on, counted and traced for those who watch: it decides nothing, and nobody waits for it."""
