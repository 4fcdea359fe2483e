"""One token a row through many adapters: gathered, walked, or by a kernel of our own. Knows no cache and no request."""
