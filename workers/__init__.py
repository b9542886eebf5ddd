"""The node's Celery workers: thin tasks."""
