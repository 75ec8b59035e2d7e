"""``manage.py train_model`` with steps that a tiny random model learns from, and room to lose."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import django


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    django.setup()
    from django.core.management import call_command
    from django.core.management.base import CommandError

    from assistant.modelkit import corpus, judging, tune

    gentle, written = tune.gentle, corpus.written
    tune.gentle = lambda *args: replace(gentle(*args), learning_rate=5e-3, batch_tokens=512)
    corpus.written = lambda *names: written(*names)[:: 20 if names == ("natural_dev",) else 1]
    judging.MOST_LOST = 1.0
    try:
        call_command("train_model", *sys.argv[1:])
    except CommandError as error:
        sys.exit(f"CommandError: {error}")


if __name__ == "__main__":
    main()
