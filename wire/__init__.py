"""What crosses a process boundary: types, messages, codec, sockets, errors. Knows no scheduler, store or model."""
