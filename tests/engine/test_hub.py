"""Fetching from the Hub, against a stand-in that speaks as much of its protocol as is used here.

The stand-in serves one repository from a folder and notes every path it was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from assistant.engine.manifest import Manifest
from assistant.modelkit import hub
from assistant.modelkit.checkpoint import Checkpoint, CheckpointError, write_random
from assistant.modelkit.hub import HubError, download, is_hub_id
from tests.conftest import ROOT, free_port

REPO, COMMIT = "owner/shop-135m", "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"
HIDDEN = ("pytorch_model.bin", "modeling_shop.py", "onnx/model.onnx", "consolidated.safetensors")


@dataclass
class StandIn:
    """What is served, and how the server misbehaves."""

    folder: Path
    port: int
    asked: list[str] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    commit: str = COMMIT
    #: Bytes of the weights that the server keeps back, and whether it breaks off instead of lying.
    short: int = 0
    breaks: bool = False
    altered: bool = False
    #: Where each transfer of the weights began.
    begun: list[int] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> set[str]:
        """Files whose bytes were sent."""
        return {line.split(f"/{COMMIT}/")[1] for line in self.asked if line.startswith("GET /own")}

    def listing(self) -> dict[str, Any]:
        siblings = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(self.folder).as_posix()
                one: dict[str, Any] = {"rfilename": name, "size": path.stat().st_size}
                if name.endswith((".safetensors", ".bin")):
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    one["lfs"] = {"sha256": digest, "size": one["size"], "pointerSize": 134}
                siblings.append(one)
        return {"id": REPO, "modelId": REPO, "sha": self.commit, "siblings": siblings}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        for part, (status, code) in self.hub.refuse.items():
            if part in path:
                return self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})
        if path == f"/api/models/{REPO}/revision/main":
            return self.send(200, json.dumps(self.hub.listing()).encode())
        if path.startswith(f"/api/models/{REPO}/"):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        file = self.hub.folder / path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if path.startswith(f"/{REPO}/") and file.is_file():
            return self.send_file(file)
        self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, file: Path) -> None:
        body = file.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        whole, begin = len(body), 0
        if (asked := self.headers.get("Range")) is not None:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{whole - 1}/{whole}"
        body = body[begin:]
        if file.name == WEIGHTS and self.command == "GET":
            self.hub.begun.append(begin)
            if self.hub.altered:
                body = bytes(len(body))
            if self.hub.breaks:
                self.hub.breaks = False
                return self.send(200, body, headers, cut=len(body) // 2)
            body = body[: len(body) - self.hub.short]
        self.send(206 if begin else 200, body, headers)

    def send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) - cut])
        self.close_connection = self.close_connection or bool(cut)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the machine is set to: the only Hub here is the stand-in."""
    from huggingface_hub import constants, utils

    # Sessions remember what was set when they were made; version 1 renamed the function.
    forget = getattr(utils, "reset_sessions", None) or utils.close_session
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    forget()
    yield
    forget()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    """A Hub that offers a tiny model, and beside it things that nobody may ask for."""
    folder = tmp_path / "repo"
    write_random("tiny", folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "onnx").mkdir()
    for name in HIDDEN:
        (folder / name).write_bytes(b"never")
    stand_in = StandIn(folder, free_port())
    handler = type("Bound", (Handler,), {"hub": stand_in})
    with ThreadingHTTPServer(("127.0.0.1", stand_in.port), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield stand_in
        http.shutdown()
        thread.join()


def fetch(server: StandIn, cache: Path, **how: Any) -> tuple[Path, list[str]]:
    lines: list[str] = []
    how = {"endpoint": server.endpoint, "cache_dir": cache, **how}
    return download(REPO, lines.append, **how), lines


def shard(folder: Path, *names: str) -> None:
    """The repository's weights under other names, and an index that says so."""
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_text(f"weights of {name}")
    places = {f"tensor {number}": name for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


# --- What is fetched ------------------------------------------------------------------------------


def test_a_model_is_fetched_and_opens(server: StandIn, tmp_path: Path) -> None:
    folder, lines = fetch(server, tmp_path / "cache")
    assert Checkpoint.open(folder).shape.hidden_size == 48
    assert (folder / WEIGHTS).read_bytes() == (server.folder / WEIGHTS).read_bytes()
    assert lines == [f"fetching {WEIGHTS} (0.00 GB), 1 of 1"]


def test_neither_pickles_nor_code_nor_other_copies_are_asked_for(
    server: StandIn, tmp_path: Path
) -> None:
    fetch(server, tmp_path / "cache")
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "inhouse.json", WEIGHTS}
    assert server.fetched() == wanted
    assert not [line for line in server.asked if line.endswith(HIDDEN)]


def test_a_second_time_nothing_is_fetched(server: StandIn, tmp_path: Path) -> None:
    first, _ = fetch(server, tmp_path / "cache")
    server.asked.clear()
    second, lines = fetch(server, tmp_path / "cache")
    assert first == second
    assert server.fetched() == set()
    assert lines == [f"fetching {WEIGHTS} (0.00 GB), 1 of 1, here already"]


def test_all_shards_are_fetched_and_no_other_file(server: StandIn, tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shard(server.folder, *names)
    _, lines = fetch(server, tmp_path / "cache")
    assert {name for name in server.fetched() if name.endswith(".safetensors")} == set(names)
    assert [line.split(", ")[1] for line in lines] == ["1 of 2", "2 of 2"]


def test_a_broken_download_is_taken_up_where_it_broke(server: StandIn, tmp_path: Path) -> None:
    server.breaks = True
    with contextlib.suppress(HubError):  # some versions of huggingface_hub go on by themselves
        fetch(server, tmp_path / "cache")
    folder, _ = fetch(server, tmp_path / "cache")
    whole = (server.folder / WEIGHTS).read_bytes()
    assert (folder / WEIGHTS).read_bytes() == whole
    assert server.begun[0] == 0
    assert server.begun[1] > len(whole) // 4


@pytest.mark.slow
def test_the_command_builds_a_model_from_the_hub(server: StandIn, tmp_path: Path) -> None:
    """The whole way, in a process of its own: the Hub's address is read when it is imported."""
    command = [sys.executable, "manage.py", "build_model", REPO, str(tmp_path / "out")]
    home = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **home}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "looking for it on the Hub" in found.stdout
    assert Manifest.load(tmp_path / "out").quant == "static8"
    assert not [line for line in server.asked if line.endswith(HIDDEN)]


def test_a_name_that_could_be_a_path_here_is_one(tmp_path: Path) -> None:
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M-Instruct")
    (tmp_path / "runs").mkdir()
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        for name in (
            "runs",
            "runs/mistyped",
            "./a/b",
            "/a/b",
            "a/b/c",
            "../a",
            "a",
            "a/../b",
            "~/a",
        ):
            assert not is_hub_id(name), name
    finally:
        os.chdir(here)


# --- What is refused ------------------------------------------------------------------------------


def refused(server: StandIn, cache: Path, message: str, **how: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(server, cache, **how)
    assert "\n" not in str(caught.value)


GATED = {"GatedRepo": (401, "GatedRepo")}
REFUSALS: dict[str, tuple[dict[str, tuple[int, str]], str]] = {
    "no such model": (
        {"api": (404, "RepoNotFound")},
        "no folder owner/shop-135m here and no model",
    ),
    "unknown to strangers": ({"api": (401, "RepoNotFound")}, "private.*HF_TOKEN"),
    "gated": ({"api": (403, "GatedRepo")}, "gated: accept its terms on http.*HF_TOKEN"),
    "gated weights": ({"resolve": (401, "GatedRepo")}, "gated: accept its terms"),
    "forbidden weights": ({WEIGHTS: (403, "")}, "gated: accept its terms"),
    "a server in trouble": ({"api": (501, "")}, "answered 501"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_what_to_do(case: str, server: StandIn, tmp_path: Path) -> None:
    server.refuse, message = REFUSALS[case]
    refused(server, tmp_path / "cache", message)
    assert WEIGHTS not in server.fetched()


def test_a_revision_that_is_not_there_is_named(server: StandIn, tmp_path: Path) -> None:
    refused(server, tmp_path / "cache", "no such revision.*'v9'", revision="v9")


def test_a_server_that_is_no_hub_is_refused(server: StandIn, tmp_path: Path) -> None:
    server.commit = "../../escape"
    refused(server, tmp_path / "cache", "names no commit.*HF_ENDPOINT")


def test_without_a_network_the_way_out_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"No network.*pass its folder") as caught:
        download(REPO, print, endpoint=f"http://127.0.0.1:{free_port()}", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_offline_mode_is_named(server: StandIn, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom assistant.modelkit.hub import download\n"
        f"download({REPO!r}, print, endpoint=sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, server.endpoint, str(tmp_path)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert "HubError: HF_HUB_OFFLINE is set" in found.stderr.splitlines()[-1]
    assert server.asked == []


def test_another_family_is_refused_before_its_weights_are_fetched(
    server: StandIn, tmp_path: Path
) -> None:
    path = server.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    refused(server, tmp_path / "cache", "'gpt2' is not built here.*--via optimum")
    assert WEIGHTS not in server.fetched()
    fetch(server, tmp_path / "cache", any_family=True)
    assert WEIGHTS in server.fetched()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_repository_without_what_a_build_needs_is_refused(
    name: str, server: StandIn, tmp_path: Path
) -> None:
    (server.folder / name).unlink()
    refused(server, tmp_path / "cache", f"offers no {name}")


def test_a_repository_of_pickles_is_refused(server: StandIn, tmp_path: Path) -> None:
    (server.folder / WEIGHTS).unlink()
    refused(
        server, tmp_path / "cache", "offers no model.safetensors.*'pytorch_model.bin', a pickle"
    )
    assert not [line for line in server.asked if line.endswith(HIDDEN)]


def test_an_index_may_name_only_shards_that_are_offered(server: StandIn, tmp_path: Path) -> None:
    shard(server.folder, "model-1.safetensors", "model-2.safetensors")
    (server.folder / "model-2.safetensors").unlink()
    refused(server, tmp_path / "cache", r"lacks the shard model-2\.safetensors")


def test_an_index_may_not_point_elsewhere(server: StandIn, tmp_path: Path) -> None:
    (server.folder / WEIGHTS).unlink()
    index = {"weight_map": {"a": "../../pytorch_model.bin"}}
    (server.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(server, tmp_path / "cache", "a shard is a .safetensors file in the folder itself")


@pytest.mark.parametrize("most_gb", [0.000_1, -1.0, float("nan")])
def test_more_than_allowed_is_not_begun(most_gb: float, server: StandIn, tmp_path: Path) -> None:
    refused(server, tmp_path / "cache", r"take 0\.00 GB.*--max-download-gb", most_gb=most_gb)
    assert WEIGHTS not in server.fetched()


def test_a_disk_too_small_is_seen_before_the_download(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 60_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(server, tmp_path / "cache", "has 0.00 GB free. Free some, or set HF_HOME")
    assert WEIGHTS not in server.fetched()


def test_a_disk_that_fills_up_meanwhile_is_named(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def full(*args: Any, **how: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    refused(server, tmp_path / "cache", "The disk is full while downloading config.json")


def test_a_file_cut_short_is_not_taken(server: StandIn, tmp_path: Path) -> None:
    server.short = 100
    refused(server, tmp_path / "cache", "download broke, while downloading model.safetensors")
    server.short = 0
    folder, _ = fetch(server, tmp_path / "cache")
    assert (folder / WEIGHTS).read_bytes() == (server.folder / WEIGHTS).read_bytes()


def test_a_file_altered_on_the_way_is_thrown_away(server: StandIn, tmp_path: Path) -> None:
    server.altered = True
    refused(server, tmp_path / "cache", "arrived altered.*run the command again")
    server.altered = False
    folder, _ = fetch(server, tmp_path / "cache")
    assert Checkpoint.open(folder).shape.hidden_size == 48


def test_nothing_of_the_hub_is_loaded_for_a_local_build(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom assistant.modelkit import build, hub\n"
        "assert not hub.is_hub_id(sys.argv[1])\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)
    assert hub.MOST_GB == 8
