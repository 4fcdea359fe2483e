"""How what a server does grows with one thing at a time: `python -m bench.curves NAME`."""
