"""QEMU microvm."""
