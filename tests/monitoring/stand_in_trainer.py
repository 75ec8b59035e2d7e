"""Stands in for ``manage.py train_model``: takes its arguments, builds a random model in a moment.

What it should do besides is the first argument: ``ok``; ``hang`` (until it is killed); ``refuse``
(as without the extra); ``fall_short`` (a model that says itself that it did not pass); ``die``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how")
    for name in ("--from", "--data", "--out", "--model-version"):
        parser.add_argument(name, required=True)
    parser.add_argument("--resume", action="store_true")
    told = parser.parse_args()
    out = Path(told.out)
    with (out / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    rows = [json.loads(line) for line in Path(told.data).read_text().splitlines()]
    print(f"step 20  answer 1.000  corrections {len(rows)} of {len(rows)} right, 0 surely  at most")
    if told.how == "refuse":
        sys.exit("CommandError: torch, onnx is not installed. Install the extra: pip install x")
    if told.how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if told.how == "hang":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("hanging")
        time.sleep(120)
    _build(out, told.model_version, passed=told.how != "fall_short")
    if told.how == "fall_short":
        sys.exit("CommandError: NOT PASSED: only 10.0% of the corrections are right afterwards.")
    print("passed: All held.")


def _build(out: Path, version: str, passed: bool) -> None:
    from assistant.engine.manifest import Manifest
    from assistant.modelkit.build import build_random

    build_random("tiny", out / ".draft", quant="row8", seed=7)
    manifest = Manifest.load(out / ".draft")
    quality = {"corrections": {"passed": passed}}
    replace(manifest, version=version, quality=quality).write(out / ".draft")
    (out / ".draft").replace(out / "model")


if __name__ == "__main__":
    main()
