"""The node agent: QUIC with mutual TLS, for what cannot wait in a queue."""
