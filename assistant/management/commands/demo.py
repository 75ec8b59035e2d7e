"""``manage.py demo``: a working product from a clone, with one command.

Migrates, seeds once, warms the model, starts the background worker and serves until Ctrl-C. What is
seeded are fixtures of the apps above this one, loaded by name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser

FIXTURES = ("demo_rules", "demo_reviewed", "demo_conversations")
#: name -> (first name, is staff)
PEOPLE = {"ana": ("Ana", False), "ben": ("Ben", False), "sam": ("Sam", True)}

#: Reserved names and numbers: nobody is called by accident.
SHOP = {
    "Company": "Example Shop",
    "Website": "shop.example",
    "Support Phone": "+1 555 0100",
    "Support Email": "help@shop.example",
    "Support Hours": "Monday to Friday, 9:00 to 17:00",
}


class Command(BaseCommand):
    help = "Migrate, seed demo data, start the server and the worker; stop everything on Ctrl-C."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py demo\n"
            "  manage.py demo --port 9000 --data-dir /tmp/inhouse\n"
            "  manage.py demo --reset          forget the demo's data and seed it again"
        )
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
        parser.add_argument("--port", type=_port, default=8000)
        parser.add_argument("--data-dir", metavar="DIR", help="same as ASSISTANT_DATA_DIR")
        parser.add_argument("--no-worker", action="store_true", help="no background worker")
        parser.add_argument("--reset", action="store_true", help="delete the demo's data first")

    def handle(self, *args: Any, **options: Any) -> None:
        _use_data_dir(options["data_dir"])
        _refuse_taken_port(options["host"], options["port"])
        _open_to_visitors(options["host"])
        if options["reset"]:
            self._reset()
        # The server re-raises the signal that ended it: let that unwind, so the worker is stopped.
        _on_signals(lambda *_: sys.exit(0))
        worker = None
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self._say(f"Preparing the data in {settings.DATA_DIR} ...")
                call_command("migrate", verbosity=0)
                passwords = _seed()
                self._say("Loading the model ...")
                problem = _warm_up()
                worker = None if options["no_worker"] else _start_worker()
                _serve(options, lambda: self._greet(options, passwords, problem))
        finally:
            # A second Ctrl-C would leave the worker behind.
            _on_signals(signal.SIG_IGN, signal.SIGINT)
            _stop(worker)
            self.stdout.write("Stopped.")

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()

    def _reset(self) -> None:
        from django.db import connection

        if connection.vendor != "sqlite":
            raise CommandError("--reset deletes only a SQLite demo; empty your database yourself.")
        connection.close()
        base = str(connection.settings_dict["NAME"])
        for path in (base, f"{base}-wal", f"{base}-shm", str(_passwords_file())):
            Path(path).unlink(missing_ok=True)
        self.stdout.write("The demo's data is gone; seeding again.")

    def _greet(self, options: dict[str, Any], passwords: dict[str, str], problem: str) -> None:
        host = "127.0.0.1" if options["host"] in ("0.0.0.0", "::") else options["host"]  # noqa: S104
        url = f"http://{f'[{host}]' if ':' in host else host}:{options['port']}"
        people = "\n".join(
            f"    {name:<6} {passwords.get(name, '(your own password)'):<16} "
            f"{'staff: reads conversations in admin' if staff else 'customer'}"
            for name, (_, staff) in PEOPLE.items()
        )
        if problem:
            self.stdout.write(self.style.WARNING(f"\nThe model is unavailable: {problem}"))
        self.stdout.write(
            f"\n  {self.style.SUCCESS('Inhouse is running.')}\n\n"
            f"  Chat    {url}/\n  Admin   {url}/admin/\n  API     {url}/api/v1/conversations/\n\n"
            f"  Sign in as\n{people}\n\n"
            f"  Data    {settings.DATA_DIR}\n  Ctrl-C stops everything.\n"
        )
        self.stdout.flush()


def _port(text: str) -> int:
    """Raises: ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _use_data_dir(folder: str | None) -> None:
    """Settings are read once, at start: another folder means starting again with it."""
    if folder is None or Path(folder).expanduser().resolve() == Path(settings.DATA_DIR).resolve():
        return
    os.environ["ASSISTANT_DATA_DIR"] = str(Path(folder).expanduser().resolve())
    os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - ourselves again


def _on_signals(handler: Any, *more: signal.Signals) -> None:
    """What ends us besides Ctrl-C: a supervisor, or the terminal being closed."""
    for number in (signal.SIGTERM, signal.SIGHUP, *more):
        signal.signal(number, handler)


def _refuse_taken_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CommandError(
                f"Cannot listen on {host}:{port} ({error}). "
                f"Stop what runs there, or choose another: manage.py demo --port {port + 1}"
            ) from error


def _open_to_visitors(host: str) -> None:
    """The demo's own settings: visitors may chat, an imagined shop's contacts, and the host."""
    settings.ASSISTANT_ANONYMOUS = True
    known = settings.ASSISTANT["FACTS"]
    known |= {name: known.get(name) or value for name, value in SHOP.items()}
    if host in ("0.0.0.0", "::"):  # noqa: S104
        settings.ALLOWED_HOSTS = ["*"]
    elif host not in settings.ALLOWED_HOSTS:
        settings.ALLOWED_HOSTS = [*settings.ALLOWED_HOSTS, host]


def _passwords_file() -> Path:
    return Path(settings.DATA_DIR) / "demo_passwords.json"


def _seed() -> dict[str, str]:
    """Users and fixtures, once; the demo's passwords, which are kept beside the data."""
    from django.contrib.auth import get_user_model

    users = get_user_model().objects
    path = _passwords_file()
    if path.exists() and users.filter(username__in=PEOPLE).count() == len(PEOPLE):
        found: dict[str, str] = json.loads(path.read_text())
        return found
    passwords = {name: secrets.token_urlsafe(9) for name in PEOPLE}
    for name, (first_name, staff) in PEOPLE.items():
        user, _ = users.get_or_create(username=name, defaults={"first_name": first_name})
        user.is_staff = user.is_superuser = staff
        user.set_password(passwords[name])
        user.save()
    call_command("loaddata", *FIXTURES, verbosity=0)
    path.touch(mode=0o600)
    path.write_text(json.dumps(passwords))
    return passwords


def _warm_up() -> str:
    """Loads the model before the first question; why it cannot answer, if it cannot."""
    from assistant import backends
    from assistant.errors import AssistantError

    alias = backends.answering()
    try:
        if alias is not None:
            backends.get(alias).check()
    except AssistantError as error:
        return str(error)
    return ""


def _start_worker() -> subprocess.Popen[bytes]:
    log = Path(settings.DATA_DIR) / "worker.log"
    schedule = Path(settings.DATA_DIR) / "celery" / "schedule"
    command = [sys.executable, "-m", "celery", "-A", "config", "worker", "--beat",
               "--pool", "solo", "--loglevel", "WARNING", "--schedule", str(schedule)]  # fmt: skip
    environment = {**os.environ, "ASSISTANT_DATA_DIR": str(settings.DATA_DIR)}
    with log.open("ab") as output:
        # A group of its own: Ctrl-C reaches us alone, and we stop the worker in order.
        return subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            command, stdout=output, stderr=output, env=environment, cwd=settings.BASE_DIR,
            start_new_session=True,
        )  # fmt: skip


def _serve(options: dict[str, Any], listening: Callable[[], None]) -> None:
    """Serves until a signal; calls ``listening`` once the port is open, not before."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listening()

    config = uvicorn.Config(
        "config.asgi:application",
        host=options["host"],
        port=options["port"],
        log_level="warning",
        ws_max_size=64 * 1024,
        timeout_graceful_shutdown=5,
        lifespan="off",
        server_header=False,
        proxy_headers=False,  # settings say which proxies are ours
    )
    Server(config).run()


def _stop(worker: subprocess.Popen[bytes] | None, patience_s: float = 10) -> None:
    from assistant import backends

    backends.reset()
    if worker is None or worker.poll() is not None:
        return
    worker.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)  # its timetable is a process of its own
        worker.wait()
