"""What the services need of the outside: protocols and their value types. Each docstring is the contract.

One suite under ``tests/contracts`` runs over the fake and the real driver of each. Every method may be repeated:
it observes, acts if needed, and leaves the same end state.
"""
