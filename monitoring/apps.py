"""Observes everything below; nothing imports it."""

from django.apps import AppConfig
from django.conf import settings


class MonitoringConfig(AppConfig):
    name = "monitoring"
    verbose_name = "Monitoring"

    def ready(self) -> None:
        from monitoring import (
            draining,
            drift,
            jobs,
            logs,
            loop,
            metrics,
            reading,
            request_log,
            rollups,
            shadow,
            shadowing,
            tracing,
        )

        metrics.connect()
        logs.use_structlog()
        logs.connect()
        request_log.connect()
        rollups.connect()
        tracing.connect()
        draining.obey()
        shadowing.connect()
        reading.SOURCES["shadow"] = shadow.readings
        reading.SOURCES["drift"] = drift.readings
        reading.SOURCES["jobs"] = jobs.last_successes
        reading.SOURCES["evaluation"] = loop.latest_scores
        if settings.PROMETHEUS_MULTIPROC_DIR:
            reading.copy_from_now_on()
