"""The command line: parses, asks, shows."""
