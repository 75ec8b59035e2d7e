"""Who answers, and what if they cannot."""

from django.apps import AppConfig


class FallbackConfig(AppConfig):
    name = "fallback"
    verbose_name = "Rules and reviewed answers"
