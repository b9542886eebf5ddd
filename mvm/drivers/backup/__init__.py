"""Backups of a node: the file, taking one, restoring one."""
