"""What runs next, where, beside whom and at which price: pure and synchronous. Nothing in this room may do I/O."""
