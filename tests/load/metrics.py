"""What ten Prometheus servers cost users: processor time of ``/metrics``, turns with and without.

    python -m tests.load.metrics [--scrapers 10] [--every 1.0] [--seconds 10] [--rounds 3]

A server of its own with the echo backend that has answered for a while. All scrapers ask at once.
First nobody else asks: processor time a scrape, and what it is of a core. Then clients chat, in
turns with scrapers and without: ``turns_lost`` is the share by which there are fewer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.load.throughput import Server, User, _http, _rest, reply

TOKEN = "a token that opens the metrics"


async def scrape(server: Server) -> None:
    """One page, as Prometheus asks for it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n".encode()
    )
    status, _, _ = await reply(reader)
    writer.close()
    assert status == 200, "the page of metrics was refused"


async def scraping(server: Server, scrapers: int, every_s: float, seconds: float) -> int:
    """How many scrapes those were."""
    done, until = 0, time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        await asyncio.gather(*(scrape(server) for _ in range(scrapers)))
        done += scrapers
        await asyncio.sleep(max(0.0, every_s - (time.perf_counter() - began)))
    return done


async def turns(server: Server, users: list[User], seconds: float) -> float:
    """Turns a second."""
    until = time.perf_counter() + seconds
    talks = await asyncio.gather(*(_http(server, user, _rest, until) for user in users))
    return sum(len(talk) for talk in talks) / seconds


async def measure(server: Server, options: Any) -> dict[str, float]:
    users = server.users(options.clients, 200)
    await turns(server, users, 3.0)
    begun = server.cpu_s()
    scrapes = await scraping(server, options.scrapers, options.every, options.seconds)
    used = server.cpu_s() - begun
    alone, beside = [], []
    for _ in range(options.rounds):
        alone.append(await turns(server, users, options.seconds))
        rate, _ = await asyncio.gather(
            turns(server, users, options.seconds),
            scraping(server, options.scrapers, options.every, options.seconds),
        )
        beside.append(rate)
    return {
        "ms_per_scrape": round(used * 1000 / scrapes, 2),
        "share_of_a_core": round(used / options.seconds, 4),
        "turns_per_s": round(median(alone), 1),
        "turns_per_s_scraped": round(median(beside), 1),
        "turns_lost": round(1 - median(b / a for a, b in zip(alone, beside, strict=True)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scrapers", type=int, default=10)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between their scrapes")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="inhouse-load-") as folder,
        Server(Path(folder), 1, ASSISTANT_METRICS_TOKEN=TOKEN) as server,
    ):
        print(json.dumps(asyncio.run(measure(server, options)), indent=2))


if __name__ == "__main__":
    main()
