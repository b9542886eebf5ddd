"""The command line: one file a noun. A command parses, asks, shows."""
