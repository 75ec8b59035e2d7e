"""The benchmark's own arithmetic, its plans, its table, and rivals that crash, hang or lie.

No timing is asserted: what is checked is that what was measured is counted and told right.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assistant.benchmark import bounds, compare, goals, peers, reading, table, workloads
from assistant.benchmark.compare import BenchError, Cell, Plan, Status
from assistant.benchmark.drive import Answer
from assistant.benchmark.figures import (
    Fact,
    Figures,
    Level,
    Measured,
    Spread,
    Times,
    Usage,
    spreads,
)
from assistant.benchmark.lineup import Lineup, agreement
from assistant.benchmark.meter import Meter
from assistant.benchmark.peers.base import Task
from assistant.benchmark.peers.closed_loop import Chats
from assistant.benchmark.peers.gguf_file import gguf_name, half_to_pairs
from assistant.benchmark.sides import Process, Side, SideError
from assistant.benchmark.workloads import Job, Load, Sizes

QUICK = Sizes.quick()
STAND_IN = "tests.load.stand_in"


def silent(line: str) -> None:
    """Progress nobody watches."""


# -- figures -------------------------------------------------------------------------------------


def test_tokens_that_come_together_are_one_gap_and_zeros() -> None:
    times = Times()
    times.saw(0.5, 2, first=True)
    times.saw(0.1, 3, first=False)
    assert times.ttft == [0.5]
    assert times.gaps == [0.0, 0.1, 0.0, 0.0]
    assert times.tokens == 5


def test_an_answers_arrivals_are_counted_once_each() -> None:
    answer, times = Answer(10.0, [7, 8, 9], [10.5, 10.5, 11.0]), Times()
    answer.into(times)
    assert (times.ttft, times.gaps, times.tokens) == ([0.5], [0.0, 0.5], 3)


def test_figures_are_percentiles_rates_and_costs() -> None:
    times = Times(ttft=[0.1, 0.2, 0.3], gaps=[0.01] * 99 + [1.0], tokens=200)
    found = Figures.of(times, Usage(wall_s=4, cpu_s=6, peak_rss_mb=123.45, others_cores=0.5))
    assert found.ttft_ms_p50 == 200
    assert found.ttft_ms_p50 < found.ttft_ms_p95 < found.ttft_ms_p99 < 300
    assert (found.itl_ms_p50, found.gap_ms_max) == (10, 1000)
    assert found.output_tokens_per_s == 50
    assert (found.cpu_s_per_1k_tokens, found.others_cores) == (30, 0.5)


def test_figures_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no token came"):
        Figures.of(Times(), Usage(1, 1, 1))


def test_a_spread_is_median_least_and_most() -> None:
    assert Spread.of([5, 1, 3]) == Spread(3, 1, 5)
    one, other = (Measured(facts=(Fact("gap", value, "ms", ""),)) for value in (4.0, 8.0))
    assert spreads([one, other]) == {"gap": Spread(6, 4, 8)}


# -- workloads -----------------------------------------------------------------------------------


def test_workloads_come_in_their_own_order() -> None:
    assert workloads.chosen("ttft, single") == ("single", "ttft")
    assert workloads.chosen("all") == tuple(workloads.WORKLOADS)


def test_an_unknown_workload_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'fast' is no workload; known: single, .*, or all"):
        workloads.chosen("single,fast")


WRONG_SIZES: dict[str, dict[str, Any]] = {
    "no answers": {"rounds": 0},
    "no chats": {"chats": (0,)},
    "no load": {"share": 0.0},
    "no time": {"idle_s": -1.0},
    "falling readers": {"readers": (100, 50)},
}


@pytest.mark.parametrize("wrong", WRONG_SIZES)
def test_sizes_that_cannot_be_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"start at 1|must be above 0|must rise"):
        Sizes(**WRONG_SIZES[wrong])


def test_a_job_survives_the_pipe() -> None:
    for job in workloads.jobs(tuple(workloads.WORKLOADS), QUICK):
        assert Job.from_wire(json.loads(json.dumps(job.wire()))) == job


def test_every_workload_becomes_at_least_one_job() -> None:
    found = workloads.jobs(tuple(workloads.WORKLOADS), Sizes())
    assert {job.workload for job in found} == set(workloads.WORKLOADS)
    assert [job.label for job in found[:5]] == [
        "1 chat", "8 chats", "32 chats", "prompt 64", "prompt 512",
    ]  # fmt: skip
    assert all(job.load for job in found if job.workload in workloads.SHARED)


def test_arrivals_are_the_same_for_the_same_seed_and_come_at_the_rate_asked_for() -> None:
    times = workloads.poisson(50, 5000, seed=4)
    assert times == workloads.poisson(50, 5000, seed=4) != workloads.poisson(50, 5000, seed=5)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100, rel=0.05)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1), "as exponential gaps have it"


def test_arrivals_need_a_rate() -> None:
    with pytest.raises(ValueError, match="rate above 0"):
        workloads.poisson(0, 5)


def test_prompts_leave_control_tokens_and_the_last_id_alone() -> None:
    ids = np.array(Load(20, 50).prompts(100))
    assert ids.shape == (20, 50)
    assert ids.min() >= 50 and ids.max() < 99
    assert Load(20, 50).prompts(100) == ids.tolist() != Load(20, 50).warm_up().prompts(100)


# -- closed loop of peers ------------------------------------------------------------------------


class Echo:
    """A model whose next token is one more than its last; it checks what it is fed."""

    def __init__(self, chats: int) -> None:
        self.contexts: list[list[int]] = [[] for _ in range(chats)]

    def run(self, chats: Chats, room: int) -> Iterator[int]:
        """Tokens of each step."""
        chats.begin()
        while rows := chats.plan(room):
            for chat, place, tokens, _ in rows:
                assert place == len(self.contexts[chat]), "a place is skipped or run twice"
                self.contexts[chat] += tokens
            yield sum(len(tokens) for _, _, tokens, _ in rows)
            asked = [self.contexts[chat][-1] + 1 for chat, _, _, wanted in rows if wanted]
            for chat in chats.accept(asked):
                self.contexts[chat] = []


@pytest.mark.parametrize("room", [4, 7, 1000])
def test_every_chat_is_answered_however_small_the_batch(room: int) -> None:
    load = Load(chats=3, prompt_tokens=5, new_tokens=4, rounds=2)
    chats = Chats(load, 1000)
    steps = list(Echo(3).run(chats, room))
    assert max(steps) <= room
    starts = [prompt[-1] for prompt in load.prompts(1000)]
    assert chats.written == [[start + 1, start + 2, start + 3, start + 4] * 2 for start in starts]
    assert chats.times.tokens == 24
    assert (len(chats.times.ttft), len(chats.times.gaps)) == (6, 18)


def test_a_closed_loop_takes_its_times_from_the_clock() -> None:
    ticks = iter(float(tick) for tick in range(100))
    chats = Chats(Load(1, 3, 3, 1), 100, clock=lambda: next(ticks))
    list(Echo(1).run(chats, 10))
    assert (chats.times.ttft, chats.times.gaps) == ([1.0], [1.0, 1.0])


# -- gguf ----------------------------------------------------------------------------------------


def test_reordered_rows_turn_neighbours_as_halves_were_turned() -> None:
    """Rotary by halves on the original rows equals rotary by pairs on the reordered ones."""
    rng = np.random.default_rng(0)
    heads, size = 2, 8
    q, k = rng.standard_normal((2, heads * size, 5)).astype(np.float32)
    x, y = rng.standard_normal((2, 5)).astype(np.float32)
    angles = {0: np.linspace(0.1, 1, size // 2), 1: np.linspace(0.5, 3, size // 2)}

    def halves(vector: Any, angle: Any) -> Any:
        one, other = vector.reshape(heads, 2, size // 2).swapaxes(0, 1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=1)

    def pairs(vector: Any, angle: Any) -> Any:
        one, other = vector.reshape(heads, size // 2, 2).transpose(2, 0, 1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.stack([one * cos - other * sin, other * cos + one * sin], axis=2).reshape(
            heads, size
        )

    theirs = (half_to_pairs(matrix, heads) for matrix in (q, k))
    expected = (halves(q @ x, angles[0]) * halves(k @ y, angles[1])).sum(axis=1)
    query, key = (matrix @ vector for matrix, vector in zip(theirs, (x, y), strict=True))
    found = (pairs(query, angles[0]) * pairs(key, angles[1])).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(half_to_pairs(q, heads), q)


def test_other_weights_keep_their_order() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert half_to_pairs(matrix, 0).tolist() == matrix.tolist()


def test_tensors_have_llama_cpps_names() -> None:
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("model.layers.12.mlp.down_proj.weight") == "blk.12.ffn_down.weight"
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.q_proj.bias")


# -- bounds --------------------------------------------------------------------------------------

MACHINE = bounds.Machine(cached_bandwidth=2e10, bandwidth=1e10, operations=1e12)
MODEL = bounds.Model(weight_bytes=10**7, parameters=10**7, head=10**6, kv_bytes_per_token=1000)


def test_one_chat_is_bound_by_reading_the_weights_for_every_token() -> None:
    most = bounds.tokens_per_s(MACHINE, MODEL, Load(1, 1, 1000))
    assert most == pytest.approx(2e10 / 1e7, rel=0.1)


def test_many_chats_are_bound_by_products() -> None:
    most = bounds.tokens_per_s(MACHINE, MODEL, Load(10_000, 1, 100))
    assert most == pytest.approx(1e12 / (2 * 1e7), rel=0.05)


def test_a_long_context_is_bound_by_reading_keys_and_values() -> None:
    load = Load(10_000, 50_000, 50_000)
    slow = bounds.Machine(2e10, 1e8, 1e15)
    assert bounds.tokens_per_s(slow, MODEL, load) == pytest.approx(1e8 / (75_000 * 1000), rel=0.05)


def test_a_first_token_needs_the_products_of_the_whole_prompt_and_one_head() -> None:
    least = bounds.first_token_s(MACHINE, MODEL, Load(1, 1000, 1))
    assert least == pytest.approx(2 * (1000 * 9e6 + 1e6) / 1e12)


def test_without_a_rate_there_is_no_bound() -> None:
    unknown = bounds.Machine(1e10, 1e10, 0)
    assert bounds.tokens_per_s(unknown, MODEL, Load(1)) == 0
    assert bounds.first_token_s(unknown, MODEL, Load(1)) == 0


# -- readers -------------------------------------------------------------------------------------


def up_to(most: int, asked: list[int]) -> Callable[[int], bool]:
    def good(count: int) -> bool:
        asked.append(count)
        return count <= most

    return good


def test_the_search_rises_then_halves_what_is_left() -> None:
    asked: list[int] = []
    assert reading.search((50, 100, 200, 400), 2, up_to(170, asked)) == 150
    assert asked == [50, 100, 200, 150, 175]


def test_the_search_stops_at_the_end_of_its_list() -> None:
    asked: list[int] = []
    assert reading.search((50, 100), 2, up_to(10_000, asked)) == 100
    assert asked == [50, 100]


def test_none_served_is_zero() -> None:
    assert reading.search((4,), 1, up_to(0, [])) == 0


def test_a_reader_waits_for_the_latest_token() -> None:
    steady = Answer(0.0, [1, 2, 3], [1.0, 1.125, 1.25])
    assert reading.stall(steady, 8) == 0
    late = Answer(0.0, [1, 2, 3], [1.0, 1.1, 2.0])
    assert reading.stall(late, 8) == pytest.approx(0.75)


def test_a_level_is_good_when_nobody_falls_behind_and_first_tokens_come_in_time() -> None:
    assert Level(100, 999, 0, 200, 10).good
    assert not Level(100, 999, 1, 200, 10).good
    assert not Level(100, 1001, 0, 200, 10).good


# -- goals and table -----------------------------------------------------------------------------

OURS = Side("ours row8", "ours", (), ours=True)
INT4 = Side("ours int4", "ours", (), ours=True)
Q8, Q4 = (Side(f"llama.cpp {name}", "llama.cpp", ()) for name in ("Q8_0", "Q4_0"))


def cell(side: Side, label: str, *speeds: float, workload: str = "chats") -> Cell:
    job = Job(workload, label, QUICK, Load(1))
    return Cell(job, side, [Measured(figures(speed)) for speed in speeds])


def figures(speed: float, ttft: float = 10.0, others: float = 0.0) -> Figures:
    return Figures(ttft, ttft, ttft, 1.0, 2.0, 3.0, speed, 0.5, 100.0, others)


def told(key: str, value: float, workload: str) -> Cell:
    job = Job(workload, workload, QUICK)
    return Cell(job, OURS, [Measured(facts=(Fact(key, value, "ms", "a thing"),))])


def test_a_goal_is_judged_against_the_best_rival_of_the_same_run() -> None:
    cells = [
        cell(OURS, "8 chats", 300, 310, 290), cell(Q8, "8 chats", 100), cell(Q4, "8 chats", 200),
        cell(OURS, "32 chats", 300), cell(Q8, "32 chats", 200),
    ]  # fmt: skip
    reached, short = goals.verdicts(cells)
    assert (reached.value, reached.reached, reached.theirs) == (1.5, True, "llama.cpp Q4_0")
    assert str(reached) == "goal >= 1.4x: reached 1.5x"
    assert str(short) == "goal >= 1.9x: short: 1.5x"


def test_a_profile_counts_only_its_own_builds() -> None:
    cells = [
        cell(OURS, "1 chat", 90, workload="single"),
        cell(INT4, "1 chat", 120, workload="single"),
        cell(Q4, "1 chat", 100, workload="single"),
    ]
    (best,) = goals.verdicts(cells)
    (throughput,) = goals.verdicts(cells, [OURS.name])
    assert (best.ours, best.reached) == ("ours int4", True)
    assert (throughput.ours, throughput.reached) == ("ours row8", False)


def test_a_figure_that_stands_for_itself_is_judged_alone() -> None:
    (gap,) = goals.verdicts([told("intruder_gap_ms", 151, "intruder")])
    assert str(gap) == "goal <= 150 ms: short: 151 ms"
    (refusal,) = goals.verdicts([told("refusal_ms_p99", 5.0, "overload")])
    assert not refusal.reached, "5 ms is not under 5 ms"


def test_a_goal_without_a_rival_is_not_judged() -> None:
    assert goals.verdicts([cell(OURS, "8 chats", 300)]) == []


def test_a_table_lines_up_and_has_ratios_beside_ours_only() -> None:
    rows = [cell(OURS, "8 chats", 1000, 3000, 2000), cell(Q8, "8 chats", 800)]
    head, ours, theirs = table.table(rows)
    assert head.endswith("x llama.cpp") and ours.endswith("2.50")
    assert ours.startswith("8 chats  ours row8") and theirs.split()[0] == "llama.cpp"
    assert "2,000" in ours and "1,000-3,000" in ours
    assert len(ours) == len(head)
    assert head.index("tok/s") + len("tok/s") == ours.index("2,000") + len("2,000")


def test_a_first_tokens_ratio_is_of_its_time() -> None:
    slow, fast = (
        Cell(Job("ttft", "prompt 64", QUICK, Load(1)), side, [Measured(figures(1, ttft))])
        for side, ttft in ((OURS, 5.0), (Q8, 20.0))
    )
    assert table.ratio(slow, [slow, fast], "llama.cpp") == 0.25


def test_a_table_warns_where_others_were_at_work() -> None:
    quiet, disturbed = cell(OURS, "8 chats", 1000), cell(Q8, "8 chats", 900)
    assert table.warnings([quiet]) == []
    disturbed.repetitions.append(Measured(figures(500, others=1.4)))
    (line,) = table.warnings([quiet, disturbed])
    assert line.startswith("warning: in 1 rows others used up to 1.4 cores")


def test_a_meter_sees_its_own_work_and_nobody_elses() -> None:
    meter, until = Meter(), time.process_time() + 0.1
    while time.process_time() < until:
        pass
    usage = meter.stop()
    assert 0.1 <= usage.cpu_s <= usage.wall_s * (os.cpu_count() or 1)
    assert usage.peak_rss_mb > 10
    assert 0 <= usage.others_cores <= (os.cpu_count() or 1)


def test_a_missing_peer_is_named_with_its_cure() -> None:
    status = Status(Q8, trouble="not installed", why="the module llama_cpp is not installed")
    (line,) = table.statuses([status])
    assert line.startswith("llama.cpp Q8_0: not installed: pip install -e '.[peers]'")


# -- rivals that misbehave -----------------------------------------------------------------------


def stand_in(variant: str) -> Side:
    task = Task(variant, "", "", 1)
    return Side.of(f"rival {variant}", "rival", sys.executable, STAND_IN, task)


def job() -> Job:
    return workloads.jobs(("single",), QUICK)[0]


TROUBLES = {
    "crashes": ("crashed", "SIGSEGV: tile configuration failed"),
    "hangs": ("hung", "no answer within 3 s"),
    "rubbish": ("garbage", "its figures are incomplete"),
    "fails": ("failed", "no room for so many chats"),
    "missing": ("not installed", "the module rival is not installed"),
}


@pytest.mark.slow
def test_rivals_that_misbehave_are_reported_and_end_nobody_else() -> None:
    sides = [stand_in("works"), *map(stand_in, TROUBLES)]
    plan = Plan([job()], sides, repeats=2, threads=1, timeout_s=3, prepare_timeout_s=60)
    said: list[str] = []
    found = compare.run(plan, said.append)
    statuses = {status.side.name.split()[1]: status for status in found.statuses}
    for variant, (trouble, why) in TROUBLES.items():
        assert statuses[variant].trouble == trouble
        assert why in statuses[variant].why
    assert statuses["works"].trouble is None
    assert statuses["works"].about == {"version": "stand-in 1"}
    (works,) = found.cells
    assert [one.settings for one in works.repetitions] == ["its own"] * 2
    assert works.median("output_tokens_per_s") == 100
    assert "getting on" in said


def script(text: str) -> Side:
    return Side("rival", "rival", (sys.executable, "-u", "-c", text))


BABBLE = {
    "print('ready'); input()": ("garbage", "b'ready', which is no answer"),
    "print('[1]'); input()": ("garbage", "which is no answer"),
    "raise SystemExit(3)": ("crashed", "exit status 3"),
    "import os; os.close(1); input(); input()": ("crashed", "closed its pipe"),
}


@pytest.mark.parametrize("text", BABBLE)
def test_what_is_no_answer_is_not_taken_for_one(text: str) -> None:
    trouble, why = BABBLE[text]
    with Process(script(text), threads=1) as process, pytest.raises(SideError, match=why) as raised:
        process.ask({"do": "prepare"}, 20)
    assert raised.value.trouble == trouble


def test_an_endless_line_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assistant.benchmark.sides._LONGEST_LINE", 1000)
    side = script("while True: print('x' * 100, end='')")
    with Process(side, threads=1) as process, pytest.raises(SideError, match="without end"):
        process.ask({"do": "prepare"}, 20)


def test_ours_failing_first_ends_the_benchmark_with_its_reason() -> None:
    side = stand_in("fails")
    ours = Side(side.name, "ours", side.command, ours=True)
    with pytest.raises(BenchError, match=r"^no room for so many chats$"):
        compare.run(Plan([job()], [ours], 1, 1, 20), silent)


def test_ours_failing_later_loses_nothing_that_was_measured() -> None:
    first, second = stand_in("works"), stand_in("crashes")
    sides = [Side(side.name, "ours", side.command, ours=True) for side in (first, second)]
    with pytest.raises(BenchError, match="our engine crashed"):
        compare.run(Plan([job()], sides[1:], 1, 1, 20), silent)
    jobs = [job(), Job("poisson", "poisson", QUICK)]  # the stand-in knows closed loops only
    found = compare.run(Plan(jobs, sides[:1], 1, 1, 20), silent)
    assert len(found.cells) == 1
    assert found.fault.startswith("rival works failed at poisson: ")


def test_an_interrupted_benchmark_tells_what_it_has() -> None:
    seen: list[str] = []

    def interrupt(line: str) -> None:
        seen.append(line)
        if line.startswith("measuring") and len(seen) > 4:
            raise KeyboardInterrupt

    plan = Plan([job(), job()], [stand_in("works")], repeats=2, threads=1, timeout_s=20)
    found = compare.run(plan, interrupt)
    assert 1 <= sum(len(one.repetitions) for one in found.cells) < 4
    assert seen[-1].startswith("interrupted: ")


def test_agreement_says_whether_it_is_the_same_model() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 2], [3, 4]]).startswith("same model as ours: 2 of 2")
    assert agreement([[1, 2]], [[1, 3]]).startswith("NOT the same answers as ours: 0 of 1")
    said = agreement([[1]], SideError("not installed", "the module x is not installed"))
    assert said == "not checked, not installed: the module x is not installed"


# -- who runs ------------------------------------------------------------------------------------


def lineup(tmp_path: Path, **changed: Any) -> Lineup:
    given = {
        "model": tmp_path, "random": "tiny", "cache": tmp_path, "schemes": ("row8", "int4"),
        "peers": (), "pythons": {}, "threads": 1, "progress": silent, **changed,
    }  # fmt: skip
    return Lineup(**given)


def test_a_profile_stands_for_builds_by_what_they_are_meant_for(tmp_path: Path) -> None:
    line = lineup(tmp_path)
    assert line.counted("latency") == ["ours int4"]
    assert line.counted("throughput") == ["ours row8"]
    assert line.counted("") == []


def test_each_peer_gets_the_interpreter_named_for_it(tmp_path: Path) -> None:
    pythons = {"genai": "/a/python", "": "/b/python"}
    line = lineup(tmp_path, schemes=(), peers=("llama.cpp", "genai"), pythons=pythons)
    used = {side.name: side.command[0] for side in line.sides()}
    assert used["genai Engine"] == "/a/python"
    assert used["llama.cpp Q8_0"] == "/b/python"


def test_our_build_is_made_anew_when_the_builder_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    line = lineup(tmp_path, schemes=("row8",), progress=said.append)
    line.sides()
    line.sides()
    assert len([text for text in said if "building our row8" in text]) == 1
    monkeypatch.setattr("assistant.benchmark.materials.fingerprint", lambda: "another builder")
    line.sides()
    assert len([text for text in said if "building our row8" in text]) == 2


def test_an_unknown_peer_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'vllm' is no peer; known: llama\.cpp, genai"):
        peers.chosen("genai,vllm")
    assert peers.chosen("optimum,llama.cpp") == ("llama.cpp", "optimum")
