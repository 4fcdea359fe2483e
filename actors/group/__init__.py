"""Several processes that share the layers of one base model, each with its own device."""
