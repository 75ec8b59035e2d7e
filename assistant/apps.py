"""The app of everything that produces text; registers the check of its settings."""

from django.apps import AppConfig
from django.core.checks import register


class AssistantConfig(AppConfig):
    name = "assistant"
    verbose_name = "Assistant"

    def ready(self) -> None:
        from assistant import backends

        register(backends.check_settings)
