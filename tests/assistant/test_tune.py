"""``train_model --from MODEL --data FILE``: a tiny model learns corrections, is judged and marked.

Its weights are random, so it says nothing sensible; every step is the one real models go through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.conf import settings
from django.core.management import call_command
from django.core.management.base import CommandError

from assistant import facts
from assistant.engine import drafts
from assistant.engine.manifest import Calibration, Manifest
from assistant.modelkit import corpus, judging, labels, revision, tune
from assistant.modelkit.build import build
from assistant.modelkit.calibrate import write_card_source
from assistant.modelkit.corrections import Case, Said, redacted
from assistant.modelkit.tokens import Encoder, train_tokenizer

# torch warns of its own future; its warnings are not ours to mend.
pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("default")]

ROWS: list[dict[str, Any]] = [
    {"query": "the tin man wants his oil", "intent": "place_order"},
    {"query": "zebra crossing at noon", "intent": "delivery_period", "answer": "At {{Website}}."},
    {"turns": [{"role": "user", "text": "hm 48213377"}, {"role": "assistant", "text": "Yes?"},
               {"role": "user", "text": "purple please"}], "intent": "change_order"},
]  # fmt: skip
WRITTEN = corpus.written
#: An answer that the base was taught, as ids.
KNOWN = [9, 60, 61, 62, 1]


@pytest.fixture(scope="module", autouse=True)
def _needs_torch() -> None:
    pytest.importorskip("torch")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built model of our shape and labels, a hundred times smaller."""
    import torch

    from assistant.modelkit.student import Shape, Student, save_checkpoint

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([row["text"] for row in WRITTEN("plain")], 400)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = Shape(tokenizer.get_vocab_size(), 48, 2, 3, 1, 16, 64, max_position_embeddings=512)
    save_checkpoint(Student(sizes), folder)
    write_card_source(folder, "small", "0.1.0", Calibration(answer_from=0.5), {"ece": 0.1})
    own = json.loads((folder / "inhouse.json").read_text())
    (folder / "inhouse.json").write_text(json.dumps({**own, "random": True}))
    drafts.save(folder, [KNOWN])
    build(folder, folder / "model", "row8")
    (folder / "model" / "MODEL_CARD.md").write_text("# small 0.1.0\n\nSmall.\n\n## Figures\n\nx\n")
    return folder / "model"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that a random model learns from, few rows to hold it to, and room to lose."""
    gentle = tune.gentle
    monkeypatch.setattr(
        tune, "gentle", lambda *args: replace(gentle(*args), learning_rate=5e-3, batch_tokens=512)
    )
    monkeypatch.setattr(
        corpus,
        "written",
        lambda *names: WRITTEN(*names)[:: 20 if names == ("natural_dev",) else 1],
    )
    monkeypatch.setattr(judging, "MOST_LOST", 1.0)


@pytest.fixture
def corrections(tmp_path: Path) -> Path:
    path = tmp_path / "corrections.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def revise(base: Path | str, data: Path, out: Path, *args: str) -> str:
    said = StringIO()
    arguments = ["--from", str(base), "--data", str(data), "--out", str(out), *args]
    call_command("train_model", *arguments, stdout=said, no_color=True)
    return said.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# -- a whole run ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_model_learns_corrections_and_is_built_judged_and_marked(
    base: Path, corrections: Path, tmp_path: Path
) -> None:
    before, out = hashes(base), tmp_path / "run"
    said = revise(base, corrections, out, "--minutes", "3")
    manifest = Manifest.load(out / "model")
    found = manifest.quality["corrections"]
    assert said.endswith(f"Built {out / 'model'}\n") and "passed: All held: 3 corrections" in said
    assert "before: " in said and "after:  3 of 3 corrections right" in said
    assert (manifest.name, manifest.version, manifest.quant) == ("small", "0.1.0+1", "row8")
    assert manifest.calibration == Manifest.load(base).calibration
    assert found["passed"] is True and found["after"]["right"] == 1.0 and found["rows"] == 3
    assert found["after"]["answers_alike"] is not None and found["steps"] >= 60
    assert manifest.quality["base"]["model"] == "small@0.1.0"
    card = (out / "model" / "MODEL_CARD.md").read_text()
    assert card.startswith("# small 0.1.0+1\n")
    assert card.index("## Corrections") < card.index("## Figures")
    encoder = Encoder.load(base / "tokenizer.json")
    known = drafts.read(out / "model", manifest.architecture.vocab_size)
    assert known == [
        [manifest.intents["delivery_period"], *encoder.answer("At {{Website}}.")],
        KNOWN,
    ], "the answers to guess from are those of the base and of the corrections"
    assert hashes(base) == before, "the base is only read"
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("quick")
def test_a_revision_can_be_revised_again(base: Path, corrections: Path, tmp_path: Path) -> None:
    revise(base, corrections, tmp_path / "one", "--minutes", "3")
    revise(tmp_path / "one" / "model", corrections, tmp_path / "two", "--minutes", "3")
    manifest = Manifest.load(tmp_path / "two" / "model")
    assert manifest.version == "0.1.0+2"
    assert manifest.quality["base"]["model"] == "small@0.1.0+1"
    assert manifest.quality["base"]["development"] == {"ece": 0.1}
    card = (tmp_path / "two" / "model" / "MODEL_CARD.md").read_text()
    assert card.count("## Corrections") == card.count("## Figures") == 1


@pytest.mark.usefixtures("quick")
def test_what_falls_short_ends_with_an_error_and_stays_marked_for_inspection(
    base: Path, corrections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "LEAST_RIGHT", 1.1)
    with pytest.raises(CommandError, match=r"NOT PASSED: only .* of the corrections are right"):
        revise(base, corrections, tmp_path / "run", "--minutes", "0.02")
    manifest = Manifest.load(tmp_path / "run" / "model")
    assert manifest.quality["corrections"]["passed"] is False
    assert "NOT PASSED, do not use it" in (tmp_path / "run" / "model" / "MODEL_CARD.md").read_text()


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_is_resumed_and_finishes(
    base: Path, corrections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "run", tune.Run.step

    def interrupted(self: Any, *args: Any) -> Any:
        if self.steps == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tune.Run, "step", interrupted)
        with pytest.raises(CommandError, match=r"Interrupted\. Go on with .*--resume"):
            revise(base, corrections, out, "--minutes", "3")
    assert not (out / "model").exists()
    said = revise(base, corrections, out, "--minutes", "3", "--resume")
    assert "resumed at step 5, " in said and (out / "model" / "model.json").exists()


@pytest.mark.usefixtures("quick")
def test_an_interruption_while_building_leaves_no_half_model(
    base: Path, corrections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(revision, "build", interrupted)
        with pytest.raises(CommandError, match=r"--resume"):
            revise(base, corrections, out, "--minutes", "0.02")
    assert not [path.name for path in out.iterdir() if "model" in path.name]
    said = revise(base, corrections, out, "--minutes", "3", "--resume")
    assert "resumed at step" in said and (out / "model" / "model.json").exists()


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_run_is_resumed_only_with_the_same_model_and_corrections(
    base: Path, corrections: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "training.json").write_text('{"base": "x", "corrections": "y"}')
    (out / "checkpoint.pt").write_bytes(b"left from another run")
    with pytest.raises(CommandError, match=r"begun with another model or other corrections"):
        revise(base, corrections, out, "--resume")
    assert (out / "checkpoint.pt").read_bytes() == b"left from another run"


@pytest.mark.usefixtures("quick")
def test_a_broken_checkpoint_is_named(base: Path, corrections: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(CommandError):
        revise(base, tmp_path / "none.jsonl", out)
    out.mkdir(exist_ok=True)
    digest = {
        "base": revision._sha256(base / "model.onnx"),
        "corrections": revision._sha256(corrections),
    }
    (out / "training.json").write_text(json.dumps(digest))
    (out / "checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(CommandError, match=r"checkpoint\.pt cannot be read"):
        revise(base, corrections, out, "--resume")


BUNDLED = Path(settings.BASE_DIR) / "assistant" / "bundled"


@pytest.mark.parametrize("place", ["support-en", "support-en/run", "other"])
def test_the_bundled_models_are_never_written_to(place: str, corrections: Path) -> None:
    before = hashes(BUNDLED / "support-en")
    with pytest.raises(CommandError, match=r"would write into .*which is in use and stays"):
        revise("bundled", corrections, BUNDLED / place)
    assert hashes(BUNDLED / "support-en") == before and not (BUNDLED / "other").exists()


def test_the_configured_model_is_never_written_to(
    base: Path, corrections: Path, tmp_path: Path, settings: Any
) -> None:
    active = tmp_path / "active"
    model = {"BACKEND": "x", "OPTIONS": {"model_dir": str(active / "model")}}
    settings.ASSISTANT = {**settings.ASSISTANT, "BACKENDS": {"model": model}}
    with pytest.raises(CommandError, match=r"which is in use and stays as it is"):
        revise(base, corrections, active)
    with pytest.raises(CommandError, match=r"which is in use and stays as it is"):
        revise(base, corrections, base.parent)  # its own base, too
    assert not active.exists()


def test_a_finished_run_a_file_and_a_full_disk_are_refused(
    base: Path, corrections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "done" / "model").mkdir(parents=True)
    with pytest.raises(CommandError, match=r"that run is finished"):
        revise(base, corrections, tmp_path / "done")
    with pytest.raises(CommandError, match=r"is a file; name a folder"):
        revise(base, corrections, corrections)
    monkeypatch.setattr(revision.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    with pytest.raises(CommandError, match=r"needs about \d+ MB on the disk of .*1 MB are free"):
        revise(base, corrections, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_is_needed_and_must_be_there(corrections: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(corrections), "--out", str(tmp_path / "run")]
    with pytest.raises(CommandError, match=r"need a model to correct, such as --from bundled"):
        call_command("train_model", *arguments)
    with pytest.raises(CommandError, match=r"nowhere is no model: it holds neither"):
        revise(tmp_path / "nowhere", corrections, tmp_path / "run")


@pytest.mark.usefixtures("quick")
def test_bad_corrections_and_golden_ones_are_named(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "corrections.jsonl"
    path.write_text('{"query": "hello", "intent": "greetings"}\n')
    with pytest.raises(CommandError, match=r"corrections\.jsonl line 1: no intent is called"):
        revise(base, path, tmp_path / "run")
    path.write_text('{"query": "wheres my STUFF?", "intent": "complaint"}\n')
    with pytest.raises(CommandError, match=r"Every correction stands in an evaluation set"):
        revise(base, path, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_a_conversation_too_long_to_be_learned_is_named(base: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(base / "tokenizer.json")
    case = Case("c.jsonl line 4", "a", (Said("user", "why " * 400),), "complaint")
    with pytest.raises(corpus.CorpusError, match=r"c\.jsonl line 4: .* takes \d+ tokens"):
        tune.refuse_too_long([case], encoder, facts.mask, tune.gentle(1, 0, "cpu"))


# -- how it learns -------------------------------------------------------------------------------


@pytest.fixture
def maker(base: Path, quick: None) -> Callable[..., tune.Drawer]:
    import random

    mask, encoder = redacted(facts.mask), Encoder.load(base / "tokenizer.json")
    cases = [
        Case("", "a", (Said("user", "the tin man wants his oil"),), "place_order"),
        Case("", "b", (Said("user", "hm"), Said("assistant", "48213377?"), Said("user", "no")),
             "change_order"),
    ]  # fmt: skip

    def made(seed: int = 0) -> tune.Drawer:
        samples = [
            tune.sample_of(case, mask, ["track_order"] * (len(case.turns) // 2)) for case in cases
        ]
        config = tune.gentle(1, seed, "cpu")
        rng = random.Random(seed)
        return tune.Drawer(corpus.own(), samples, encoder, mask, config, rng)

    return made


def test_corrections_are_drawn_among_replayed_rows_and_only_those_are_held(
    maker: Callable[..., tune.Drawer],
) -> None:
    drawn = [maker().draw(0.5) for _ in range(1)] + [one.draw(0.5) for one in [maker(1)] * 400]
    free = [example for example in drawn if example.teacher < 0]
    wanted = {labels.INTENTS.index(name) for name in ("place_order", "change_order")}
    assert 0.25 < len(free) / len(drawn) < 0.45
    assert {example.intent for example in free} == wanted


def test_earlier_turns_are_learned_with_and_without_their_intents_and_without_values(
    maker: Callable[..., tune.Drawer],
) -> None:
    drawer = maker()
    mark, slot = drawer.intents["track_order"], drawer.encoder.id("{{Order Number}}")
    history = [drawer._history(drawer.cases[1]) for _ in range(40)]
    assert {mark in ids for ids in history} == {True, False}
    assert all(slot in ids for ids in history)


def test_what_is_not_yet_learned_is_drawn_most(maker: Callable[..., tune.Drawer]) -> None:
    drawer = maker()
    drawer.unlearned = drawer.cases[:1]
    free = [one for one in (drawer.draw(0.5) for _ in range(600)) if one.teacher < 0]
    wanted = labels.INTENTS.index("place_order")
    assert sum(one.intent == wanted for one in free) > 0.7 * len(free)


def test_held_rows_cost_nothing_while_the_model_is_the_old_one(
    base: Path, tmp_path: Path, maker: Callable[..., tune.Drawer]
) -> None:
    import torch

    from assistant.modelkit.examples import collate
    from assistant.modelkit.unpack import unpack

    unpack(base, tmp_path / "base")
    model, old = (tune.load_student(tmp_path / "base", "cpu") for _ in range(2))
    drawer = maker()
    drawn = [drawer.draw(0.5) for _ in range(60)]
    # As batches are made: what is longer than the model's reach is left out.
    held = [one for one in drawn if one.teacher >= 0 and one.at < drawer.config.max_tokens]
    loss = tune.HoldingLoss(drawer.encoder, drawer.config, old)
    _, parts = loss(model, collate(held, "cpu"))
    assert parts["hold"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    assert loss(model, collate(held, "cpu"))[1]["hold"] > 1e-3


def test_first_scores_do_not_depend_on_what_is_asked_together(base: Path, tmp_path: Path) -> None:
    from assistant.modelkit.unpack import unpack

    unpack(base, tmp_path / "base")
    model = tune.load_student(tmp_path / "base", "cpu").eval()
    encoder = Encoder.load(base / "tokenizer.json")
    prompts = [[3, 60, 61, 4], [3, 70, 4], [3, *range(60, 90), 4]]
    together = tune.first_scores(model, encoder, prompts)
    alone = [tune.first_scores(model, encoder, [prompt]) for prompt in prompts]
    for at, one in enumerate(alone):
        assert together.intents[at] == pytest.approx(one.intents[0], abs=1e-5)
        assert together.scope[at] == pytest.approx(one.scope[0], abs=1e-5)
