"""Cores and memory, from control groups as they look in containers of either version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from assistant.engine import machine
from assistant.engine.machine import cores, memory_bytes, processor_flags, saturates

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def group(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{text}\n")
    return folder


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "150000 50000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1000 1000000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu.max": ""}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "0"}, 8),
    ],
)
def test_cores_are_those_that_the_group_grants_in_time(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert cores(group(tmp_path, files)) == expected


def test_cores_are_never_more_than_this_process_may_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(tmp_path, {"cpu.max": "800000 100000"})
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert cores(tmp_path) == 1


def test_a_system_without_affinity_counts_all_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    for known, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(machine.os, "cpu_count", lambda known=known: known)
        assert cores(tmp_path) == expected
    group(tmp_path, {"cpu.max": "300000 100000"})
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 6)
    assert cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, PHYSICAL),
        ({"memory.max": "max"}, PHYSICAL),
        ({"memory.max": "123456789"}, 123456789),
        ({"memory.max": str(2**62)}, PHYSICAL),
        ({"memory.max": ""}, PHYSICAL),
        ({"memory/memory.limit_in_bytes": "67108864"}, 67108864),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, PHYSICAL),
        ({"memory.max": "max", "memory/memory.limit_in_bytes": "1000000"}, 1000000),
    ],
)
def test_memory_is_the_machine_s_or_less_where_the_group_says_so(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert memory_bytes(group(tmp_path, files)) == expected


def test_the_machine_at_hand_has_cores_and_memory() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert 0 < memory_bytes() <= PHYSICAL


@pytest.mark.parametrize(
    ("processor", "info", "expected"),
    [
        ("x86_64", "flags\t\t: fpu sse2 avx2\n", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512bw\n", True),
        ("x86_64", "model name\t: a Xeon avx512_vnni\nflags\t\t: avx2\n", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("x86_64", "flags\t\t: fpu avx2 avx_vnni\n\nflags\t\t: fpu\n", False),
        ("AMD64", "", True),
        ("aarch64", "Features\t: fp asimd asimddp i8mm\n", False),
        ("arm64", None, False),
        ("x86_64", None, True),
    ],
)
def test_fast_products_saturate_on_x86_unless_it_says_that_it_has_vnni(
    processor: str,
    info: str | None,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: processor)
    path = tmp_path / "cpuinfo"
    if info is not None:
        path.write_text(info)
    assert saturates(path) == expected
    assert ("avx2" in processor_flags(path)) == ("avx2" in (info or ""))


@pytest.mark.parametrize("needed", [True, False])
def test_a_session_is_told_only_where_it_matters(
    needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(machine, "saturates", lambda: needed)
    options = onnxruntime.SessionOptions()
    machine.exact_products(options)
    if needed:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")
