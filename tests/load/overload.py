"""The product offered more than it can write: what is still written, what the others get, and when
it is over.

    python -m tests.load.overload [--json] [--backend echo|model] [--factor 10] [--seconds 60]

A server of its own, with an echo that writes ten answers a second (or the bundled model), is first
asked by a few clients who wait for each other: its ``peak``. Then questions come at a constant
rate, whether others are answered or not, each through REST and stored; times count from when a
question was due. ``goodput`` is what the model itself answered within ten seconds of being asked,
as a share of the peak; ``quick`` is everybody else: refused, or answered by rules or a person.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assistant.benchmark.stack import QUESTIONS
from tests.load.throughput import Server, User, reply, request

USERS, CONVERSATIONS = 100, 120
#: Answers of the model that come later than this are not counted (reliability L17).
IN_TIME_S = 10.0
#: What a refusal may be: any other is not one of ours.
REFUSALS = {429: "rate_limited", 503: "overloaded"}
#: Nobody waits longer than this for anything.
PATIENCE_S = 90.0
#: A server closes a connection that was left alone for five seconds.
KEPT_S = 2.0
#: Recovered: so many answers of the model in a row, about as fast as before the load.
CALM, CALM_PAUSE_S, RECOVERY_LIMIT_S = 3, 0.2, 60.0
_BACKENDS = {
    "echo": {"DJANGO_SETTINGS_MODULE": "tests.load.narrow_settings", "ASSISTANT_BACKEND": "echo"},
    "model": {"ASSISTANT_BACKEND": "model"},
}


@dataclass(frozen=True, slots=True)
class Report:
    """*Units* stand in the names; ``peak_per_s`` and ``goodput_per_s`` are answers of the model."""

    backend: str
    factor: float
    seconds: float
    offered_per_s: float
    peak_per_s: float
    goodput_per_s: float
    goodput_percent: float
    model_ms_p99: float
    quick_ms_p50: float
    quick_ms_p99: float
    quick: int
    untyped: int
    crashes: int
    recovery_s: float
    #: How many ended in which way.
    ends: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """One question's end, and when: ``how`` is route/reason or the refusal's code; what is neither
    begins with ``?``. *Units*: seconds of ``time.perf_counter``."""

    how: str
    due: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.due

    @property
    def typed(self) -> bool:
        return not self.how.startswith("?")

    @property
    def by_model(self) -> bool:
        return self.how.partition("/")[0] == "model"


class Narrow(Server):
    """A server of one process whose users and backend are those of this measurement."""

    def __init__(self, folder: Path, backend: str) -> None:
        super().__init__(folder, 1, ASSISTANT_MAX_TURNS_PER_CALLER="10000")
        self._environment |= _BACKENDS[backend]  # the throughput's asks for the plain echo

    @property
    def crashed(self) -> bool:
        return self._process.poll() is not None


class Crowd:
    """Users in turn, each question in the conversation that was left alone longest."""

    def __init__(self, server: Server, users: Sequence[User]) -> None:
        self.port = server.port
        pairs = [(user.token, one) for user in users for one in user.conversations]
        width = len(users[0].conversations)
        # Neighbours are different users.
        ordered = [pair for at in range(width) for pair in pairs[at::width]]
        self._turns: Iterator[tuple[int, tuple[str, str]]] = enumerate(itertools.cycle(ordered))
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def ask(self, due: float) -> Seen:
        """How a question that was due then ended."""
        at, (token, conversation) = next(self._turns)
        body = {"text": QUESTIONS[at % len(QUESTIONS)]}
        sent = request(f"/api/v1/conversations/{conversation}/messages/", token, body)
        try:
            async with asyncio.timeout(PATIENCE_S):
                how = _how(*await self._exchange(sent))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            how = f"?{type(error).__name__}"
        return Seen(how, due, time.perf_counter())

    async def _exchange(self, sent: bytes) -> tuple[int, bytes, bytes]:
        """On a connection that is kept, as proxies do. Raises: OSError, EOFError."""
        reader, writer = await self._connected()
        try:
            writer.write(sent)
            found = await reply(reader)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer, time.perf_counter()))
        return found

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, since = self._idle.pop()
            if time.perf_counter() - since < KEPT_S:
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port)

    def leave(self) -> None:
        for _, writer, _ in self._idle:
            writer.close()


def _how(status: int, head: bytes, body: bytes) -> str:
    """The route and reason of an answer, or a refusal's code."""
    told = json.loads(body)
    if status in (200, 201):
        return _route(told.get("message", told))
    code = str(told.get("error", {}).get("code", ""))
    typed = REFUSALS.get(status) == code and b"\r\nretry-after:" in head
    return f"refused/{code}" if typed else f"?{status} {code}"


def _route(message: dict[str, Any]) -> str:
    """Untyped: one that has not ended, or that somebody but the model wrote for no reason."""
    route, reason = message["route"], message["degraded_reason"]
    if message["status"] != "complete" or not (reason or route == "model"):
        return f"?{message['status']} {route}"
    return f"{route}/{reason}" if reason else str(route)


# -- offering -------------------------------------------------------------------------------------


async def peak(crowd: Crowd, clients: int, seconds: float) -> tuple[float, float]:
    """Answers a second of the model to clients who each wait for theirs, and their median time."""
    until = time.perf_counter() + seconds
    seen: list[Seen] = []

    async def client() -> None:
        while (now := time.perf_counter()) < until:
            seen.append(await crowd.ask(now))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - began
    times = sorted(one.seconds for one in seen if one.by_model)
    return len(times) / took, times[len(times) // 2]


async def offer(crowd: Crowd, per_s: float, seconds: float) -> list[Seen]:
    """How each of the questions ended that came at that rate, however many still waited."""
    began = time.perf_counter()
    asked = []
    for at in range(int(per_s * seconds)):
        due = began + at / per_s
        await asyncio.sleep(due - time.perf_counter())
        asked.append(asyncio.create_task(crowd.ask(due)))
    return await asyncio.gather(*asked)


async def recovery(crowd: Crowd, usual_s: float, since: float) -> float:
    """Seconds from then until the model answers again about as fast as usual."""
    in_row, first = 0, since
    while in_row < CALM and time.perf_counter() - since < RECOVERY_LIMIT_S:
        asked = time.perf_counter()
        seen = await crowd.ask(asked)
        calm = seen.by_model and seen.seconds < 1.5 * usual_s + 0.1
        first = asked if calm and not in_row else first
        in_row = in_row + 1 if calm else 0
        await asyncio.sleep(CALM_PAUSE_S)
    return first - since if in_row == CALM else RECOVERY_LIMIT_S


async def _overloaded(crowd: Crowd, per_s: float, seconds: float, usual_s: float) -> Any:
    """What was seen, and how long after the last question was asked it was as before."""
    offering = asyncio.create_task(offer(crowd, per_s, seconds))
    await asyncio.sleep(seconds)
    calm_s = await recovery(crowd, usual_s, time.perf_counter())
    return await offering, calm_s


# -- reporting ------------------------------------------------------------------------------------


def _ms(seen: Sequence[Seen], percent: float) -> float:
    ordered = sorted(one.seconds for one in seen)
    if not ordered:
        return 0.0
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1000, 1)


def _report(options: Any, factor: float, peak_per_s: float, seen: Any, told: Any) -> Report:
    crashes, recovery_s = told
    model = [one for one in seen if one.by_model]
    quick = [one for one in seen if one.typed and not one.by_model]
    over = seen[0].due + options.seconds  # what is answered later is not what the load was given
    in_time = sum(one.seconds <= IN_TIME_S and one.ended <= over for one in model)
    goodput = in_time / options.seconds
    return Report(
        backend=options.backend,
        factor=factor,
        seconds=options.seconds,
        offered_per_s=round(len(seen) / options.seconds, 1),
        peak_per_s=round(peak_per_s, 1),
        goodput_per_s=round(goodput, 1),
        goodput_percent=round(100 * goodput / peak_per_s, 1),
        model_ms_p99=_ms(model, 99),
        quick_ms_p50=_ms(quick, 50),
        quick_ms_p99=_ms(quick, 99),
        quick=len(quick),
        untyped=sum(not one.typed for one in seen),
        crashes=crashes,
        recovery_s=round(recovery_s, 2),
        ends=dict(Counter(one.how for one in seen)),
    )


async def measure(options: Any) -> list[Report]:
    """``options``: backend, factors, seconds, peak_s, json."""
    reports = []
    with (
        tempfile.TemporaryDirectory(prefix="inhouse-load-") as folder,
        Narrow(Path(folder), options.backend) as server,
    ):
        crowd = Crowd(server, server.users(USERS, CONVERSATIONS))
        await peak(crowd, 1, 1.0)  # loads the model
        _, usual_s = await peak(crowd, 1, options.peak_s)
        peak_per_s, _ = await peak(crowd, options.clients, options.peak_s)
        for factor in options.factors:
            await recovery(crowd, usual_s, time.perf_counter())
            offered = factor * peak_per_s
            seen, calm_s = await _overloaded(crowd, offered, options.seconds, usual_s)
            told = (int(server.crashed), calm_s)
            reports.append(_report(options, factor, peak_per_s, seen, told))
            _say(reports[-1], options)
        crowd.leave()
    return reports


def _say(report: Report, options: Any) -> None:
    if options.json:
        return
    print(
        f"{report.backend:5} {report.factor:4g}x  offered {report.offered_per_s:6.1f}/s  "
        f"peak {report.peak_per_s:6.1f}/s  goodput {report.goodput_percent:5.1f} %  "
        f"quick p50 {report.quick_ms_p50:6.1f} ms, p99 {report.quick_ms_p99:7.1f} ms  "
        f"model p99 {report.model_ms_p99:7.1f} ms  untyped {report.untyped}  "
        f"crashes {report.crashes}  recovery {report.recovery_s:.1f} s  {report.ends}",
        flush=True,
    )


def parser() -> argparse.ArgumentParser:
    about, _, _ = (__doc__ or "").partition("\n\n    python")
    made = argparse.ArgumentParser(
        description=" ".join(about.split()),
        epilog="Example: python -m tests.load.overload --factor 10 --seconds 60",
    )
    made.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    made.add_argument("--backend", choices=sorted(_BACKENDS), default="echo", help="who writes")
    made.add_argument(
        "--factor", type=float, action="append", dest="factors",
        help="times its capacity; given several times, one after another (2, 5 and 10)",
    )  # fmt: skip
    made.add_argument("--seconds", type=float, default=60, help="of each load (60)")
    made.add_argument("--peak-s", type=float, default=10, help="to find the capacity (10)")
    made.add_argument("--clients", type=int, default=8, help="that find the capacity (8)")
    return made


def main() -> int:
    options = parser().parse_args()
    options.factors = options.factors or [2.0, 5.0, 10.0]
    reports = asyncio.run(measure(options))
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    return int(any(report.untyped or report.crashes for report in reports))


if __name__ == "__main__":
    sys.exit(main())
