"""What users' scripts do, with nothing but the official SDK. Each runs in a process of its own."""
