"""The process that holds one frozen base model and executes micro-batches. Knows no socket but its own, no database."""
