"""Settings: they fail loudly, keep their key safe, and refuse a careless production."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from django.conf import settings as current
from django.core.checks import run_checks

from conversations.checks import production
from tests.conftest import ROOT


def loaded(data: Path, expression: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """That expression over freshly loaded settings, in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ASSISTANT_")}
    return subprocess.run(
        [sys.executable, "-c", f"from config import settings as s; print({expression})"],
        cwd=ROOT,
        env={**clean, "ASSISTANT_DATA_DIR": str(data), **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ASSISTANT_MAX_BATCH", "abc"),
        ("ASSISTANT_MAX_BATCH", "-1"),
        ("ASSISTANT_MAX_BATCH", "0"),
        ("ASSISTANT_REQUEST_TIMEOUT_S", "soon"),
        ("ASSISTANT_RATE", "20"),
        ("DEBUG", "perhaps"),
    ],
)
def test_a_bad_value_is_refused_by_name(tmp_path, name, value):
    failed = loaded(tmp_path, "1", **{name: value})
    assert failed.returncode != 0
    assert f"{name}='{value}'" in failed.stderr.splitlines()[-1]


def test_debug_false_as_a_word_is_false(tmp_path):
    assert loaded(tmp_path, "s.DEBUG", DEBUG="false").stdout == "False\n"
    assert loaded(tmp_path, "s.DEBUG").stdout == "False\n"


def test_a_limit_that_is_off_is_off_for_axes_too(tmp_path):
    assert loaded(tmp_path, "s.AXES_ENABLED").stdout == "True\n"
    assert loaded(tmp_path, "s.AXES_ENABLED", ASSISTANT_LOGIN_RATE="off").stdout == "False\n"


def test_a_clone_gets_a_key_of_its_own_and_keeps_it(tmp_path):
    first = loaded(tmp_path, "s.SECRET_KEY")
    again = loaded(tmp_path, "s.SECRET_KEY")
    other = loaded(tmp_path / "other", "s.SECRET_KEY")
    assert first.stdout == again.stdout != other.stdout, first.stderr
    assert len(first.stdout.strip()) >= 50
    assert stat.S_IMODE((tmp_path / "secret_key").stat().st_mode) == 0o600


def test_redis_and_postgresql_are_one_variable_each(tmp_path):
    shown = loaded(
        tmp_path,
        "[s.CACHES['default']['OPTIONS'], s.CHANNEL_LAYERS['default']['BACKEND'], "
        "s.DATABASES['default']['OPTIONS'], s.SILENCED_SYSTEM_CHECKS]",
        REDIS_URL="redis://127.0.0.1:1/0",
        DATABASE_URL="postgres://u:p@127.0.0.1/db",
    ).stdout
    assert "JSONSerializer" in shown and "'SOCKET_TIMEOUT': 0.2" in shown
    assert "RedisPubSubChannelLayer" in shown and "'pool'" in shown
    assert "ratelimit" not in shown  # its checks are only silenced for local memory


def test_a_careless_production_is_refused(settings):
    settings.DEBUG = False
    settings.ALLOWED_HOSTS = ["*"]
    settings.SECRET_KEY_IS_KEPT = True
    assert [found.id for found in production()] == ["conversations.E001", "conversations.E002"]
    settings.ALLOWED_HOSTS = ["chat.example.com"]
    settings.SECRET_KEY_IS_KEPT = False
    assert production() == []


GOOD_KEY = "k8#" * 20 + "-abcdefghij"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEBUG", "true"),
        ("ALLOWED_HOSTS", "chat.example.com,*"),
        ("SECRET_KEY", ""),
        ("SECRET_KEY", "django-insecure-" + GOOD_KEY),
        ("SECRET_KEY", "changeme"),
        ("SECRET_KEY", "x" * 60),
    ],
)
def test_a_careless_production_does_not_start(tmp_path, name, value):
    """Whoever serves: settings are all that every server reads."""
    careful = {
        "ASSISTANT_HTTPS": "true",
        "ALLOWED_HOSTS": "chat.example.com",
        "SECRET_KEY": GOOD_KEY,
        "DEBUG": "false",
    }
    failed = loaded(tmp_path, "1", **{**careful, name: value})
    assert failed.returncode != 0
    last = failed.stderr.splitlines()[-1]
    assert name in last and "production" in last and GOOD_KEY not in last
    assert loaded(tmp_path, "1", **careful).returncode == 0


def test_production_settings_pass_djangos_own_list(tmp_path):
    done = subprocess.run(
        [sys.executable, "manage.py", "check", "--deploy", "--fail-level", "WARNING"],
        cwd=ROOT,
        env={
            **os.environ,
            "ASSISTANT_DATA_DIR": str(tmp_path),
            "ASSISTANT_HTTPS": "true",
            "SECRET_KEY": GOOD_KEY,
            "ALLOWED_HOSTS": "chat.example.com",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_every_variable_is_explained():
    assert len(current.ENVIRONMENT) > 25
    for variable in current.ENVIRONMENT.values():
        assert variable.help.endswith("."), variable


def test_unknown_options_backends_and_steps_are_refused_by_the_check(settings):
    echo = "assistant.backends.echo.EchoBackend"
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "BACKENDS": {
            "echo": {"BACKEND": echo, "OPTIONS": {"speed": 3}},
            "gone": {"BACKEND": "assistant.backends.gone.Backend"},
        },
        "ROUTE": ["reviewed", "nobody"],
    }
    found = [str(message.msg) for message in run_checks() if message.id == "assistant.E001"]
    assert len(found) == 3
    assert "no option 'speed'" in found[0] and "delay_s" in found[0]
    assert "'gone' cannot be imported" in found[1]
    assert "'nobody'" in found[2]


def test_the_migrations_are_complete(db):
    from django.core.management import call_command

    call_command("makemigrations", "--check", "--dry-run", verbosity=0)


def test_answers_are_kept_unless_for_no_time(tmp_path):
    assert "'cache'" in loaded(tmp_path, "s.ASSISTANT['ROUTE']").stdout
    never = loaded(tmp_path, "s.ASSISTANT['ROUTE']", ASSISTANT_CACHE_FRESH_S="0")
    assert "'cache'" not in never.stdout and "'model'" in never.stdout


def test_a_key_that_another_process_is_still_writing_is_waited_for(tmp_path):
    key = tmp_path / "secret_key"
    key.touch()
    writing = threading.Timer(1.0, key.write_text, ["k" * 60])
    writing.start()
    shown = loaded(tmp_path, "s.SECRET_KEY")
    writing.join()
    assert shown.stdout.strip() == "k" * 60, shown.stderr


@pytest.mark.slow
def test_a_key_file_that_stays_empty_is_named(tmp_path):
    (tmp_path / "secret_key").touch()
    shown = loaded(tmp_path, "s.SECRET_KEY")
    assert "secret_key is empty. Delete it, or set SECRET_KEY." in shown.stderr
