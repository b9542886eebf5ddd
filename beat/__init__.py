"""Celery Beat: the schedule, fired on every live node."""
