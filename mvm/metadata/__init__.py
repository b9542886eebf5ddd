"""The metadata service: what guests can ask about themselves, at 169.254.169.254 of their tenant's bridge."""
