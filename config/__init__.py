"""The project: settings, URLs, the ASGI application and the Celery application.

Celery is imported here so that ``shared_task`` finds it in every process that loads Django.
"""

from config.celery import app as celery_app

__all__ = ["celery_app"]
