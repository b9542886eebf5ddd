"""Fleets of microVMs for many tenants; every lifecycle operation is a job."""
