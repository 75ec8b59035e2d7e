"""Observes everything below; nothing imports it."""

from django.apps import AppConfig
from django.conf import settings


class MonitoringConfig(AppConfig):
    name = "monitoring"
    verbose_name = "Monitoring"

    def ready(self) -> None:
        from monitoring import draining, logs, metrics, reading

        metrics.connect()
        logs.connect()
        draining.obey()
        if settings.PROMETHEUS_MULTIPROC_DIR:
            reading.copy_from_now_on()
