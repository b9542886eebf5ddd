"""QUIC with mutual TLS: certificates, who a certificate names, frames, and the client of the agents."""
