"""Which adapters are hot and warm, and the folders that they come from. Knows keys, never whose they are."""
