"""``train_model`` from data to a model that answers: seconds of training on a handful of rows.

What comes out is nonsense, but every step between is the one that trains the model that ships.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from assistant import facts
from assistant.engine import Engine, EngineConfig
from assistant.engine.manifest import Manifest
from assistant.modelkit import corpus, labels

# matplotlib and torch warn of their own future; their warnings are not ours to mend.
pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("default")]

WRITTEN = corpus.written


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def row(source: str, text: str, intent: str, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"source": source, "text": text, "intent": intent, "split": split, **more}


def write_data(folder: Path) -> Path:
    """A few rows of every public set, of every kind and split that training needs."""
    folder.mkdir()
    write(
        folder,
        "support_queries",
        {"query": "cancel purchase {{Order Number}}", "intent": "cancel_order", "split": "train"},
        {"query": "i forgot my pass", "intent": "recover_password", "split": "dev"},
    )
    write(folder, "support_qa")
    closing = {"support_intent": "delete_account"}
    write(
        folder,
        "intents_banking77",
        row("banking77", "close my account now", "terminate_account", **closing),
        row("banking77", "shut my account for good", "terminate_account", "test", **closing),
        row("banking77", "what is your exchange rate", "exchange_rate"),
    )
    write(folder, "intents_natcs")
    write(
        folder,
        "intents_clinc150",
        row("clinc150", "hello there friend", "greeting"),
        row("clinc150", "tell me a story", "oos"),
        row("clinc150", "what is the meaning of life", "oos", "test"),
        row("clinc150", "how tall is the moon", "oos", "test"),
    )
    write(folder, "intents_nlupp", row("nlupp", "a table for two in the evening", "book"))
    write(folder, "user_turns_multidogo")
    return folder


def few(*names: str) -> list[dict[str, Any]]:
    """The project's own rows, but of the development set only every twentieth."""
    return WRITTEN(*names)[:: 20 if names == ("natural_dev",) else 1]


def train(data: Path, run: Path, *args: str) -> str:
    out = StringIO()
    arguments = ["--data", str(data), "--out", str(run), "--no-teacher", *args]
    call_command("train_model", *arguments, stdout=out, no_color=True)
    return out.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _needs_torch() -> None:
    pytest.importorskip("torch")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("public") / "data")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run of three seconds and everything it said."""
    run = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "written", few)
        said = train(data, run, "--minutes", "0.05", "--model-version", "0.0.1")
    yield run, said


def test_a_run_writes_a_checkpoint_settings_and_curves(trained: tuple[Path, str]) -> None:
    run, _ = trained
    for name in ("config.json", "model.safetensors", "tokenizer.json", "checkpoint.pt"):
        assert (run / name).stat().st_size > 100, name
    settings = json.loads((run / "training.json").read_text())
    assert settings["config"]["minutes"] == 0.05
    assert settings["corpus"]["labels"]["cancel_order"] > 10
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_built_model_is_whole_and_knows_its_labels(trained: tuple[Path, str]) -> None:
    run, _ = trained
    manifest = Manifest.load(run / "model")
    assert (manifest.name, manifest.version, manifest.quant) == ("support-en", "0.0.1", "static8")
    assert manifest.intents.keys() == set(labels.INTENTS)
    assert manifest.placeholders.keys() == set(facts.PLAIN_WORDS)
    assert manifest.calibration.temperature > 0


def test_the_engine_runs_the_built_model(trained: tuple[Path, str]) -> None:
    run, _ = trained
    out = StringIO()
    rows = run / "rows.jsonl"
    rows.write_text('{"query": "cancel order 48213377", "intent": "cancel_order"}\n')
    model = ["--model", str(run / "model")]
    call_command("evaluate", "--dataset", str(rows), *model, "--json", stdout=out)
    found = json.loads(out.getvalue())
    assert found["rows"] == 1 and found["model"] == "support-en@0.0.1"


def test_the_model_card_has_figures_answers_and_licences(trained: tuple[Path, str]) -> None:
    run, said = trained
    card = (run / "model" / "MODEL_CARD.md").read_text()
    assert card.startswith("# support-en 0.0.1\n")
    assert "| built route accuracy | 0." in card or "| built route accuracy | 1." in card
    assert "how do I cancel my order 48213377?" in card
    assert "CDLA-Sharing-1.0" in card and "Apache-2.0" in card
    assert "built route accuracy" in said
    assert said.endswith(f"built {run / 'model'}\n")


def test_a_resumed_run_goes_on_where_it_stopped(
    trained: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    from assistant.modelkit import train as module

    run, _ = trained
    found = corpus.build(data)
    before = clock(run)
    minutes = before["elapsed_s"] / 60 + 0.02
    config = module.TrainConfig(minutes=minutes, teach_weight=0.0)
    for name in ("checkpoint.pt", "tokenizer.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    said: list[str] = []
    module.train(found, facts.mask, tmp_path, config, resume=True, progress=said.append)
    after = clock(tmp_path)
    assert after["steps"] > before["steps"] > 0
    assert after["elapsed_s"] >= minutes * 60
    assert said[0].startswith(f"resumed at step {before['steps']:,}, ")


def clock(run: Path) -> dict[str, float]:
    import torch

    steps, tokens, elapsed_s = torch.load(run / "checkpoint.pt", weights_only=True)["clock"]
    return {"steps": steps, "tokens": tokens, "elapsed_s": elapsed_s}


def test_an_interrupted_run_keeps_its_checkpoint_and_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assistant.modelkit import train as module

    step = module.Run.step

    def interrupted(self: Any, *args: Any) -> Any:
        if self.steps == 2:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(module.Run, "step", interrupted)
    with pytest.raises(CommandError, match=r"Interrupted\. Go on with .*--resume"):
        train(data, tmp_path / "run", "--minutes", "30")
    assert clock(tmp_path / "run")["steps"] == 2
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "checkpoint.tmp").exists()


def test_an_interruption_before_training_says_that_nothing_is_lost(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "build", interrupted)
    with pytest.raises(CommandError, match=r"Interrupted\. Nothing is lost"):
        train(data, tmp_path / "run")


def test_fine_tuning_starts_from_the_weights_and_tokenizer_given(
    trained: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    from assistant.modelkit import train as module

    run, _ = trained
    config = module.TrainConfig(minutes=0.0001, learning_rate=0.0, weight_decay=0.0, teach_weight=0)
    found = module.train(corpus.build(data), facts.mask, tmp_path / "tuned", config, start=run)
    weights = {key: value for key, value in found.state_dict().items() if "embed_tokens" in key}
    from safetensors.torch import load_file

    (given,) = [v for k, v in load_file(run / "model.safetensors").items() if "embed_tokens" in k]
    (tuned,) = weights.values()
    assert abs(given - tuned).max() < 1e-6
    kept = (tmp_path / "tuned" / "tokenizer.json").read_bytes()
    assert kept == (run / "tokenizer.json").read_bytes()


def test_the_table_alone_is_fitted_anew_beside_the_same_network(
    data: Path, trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "written", few)
    built, run = trained[0] / "model", tmp_path / "run"
    said = train(data, run, "--table", "--from", str(built))
    old, new = Manifest.load(built), Manifest.load(run / "model")
    assert new.version == "0.0.1+1" and f"built {run / 'model'}" in said
    assert new.files["model.onnx"] == old.files["model.onnx"]
    assert (
        new.files["wide.npz"].sha256
        == hashlib.sha256((run / "model" / "wide.npz").read_bytes()).hexdigest()
    )
    assert new.quality["kinds"].keys() == old.quality["kinds"].keys()
    with pytest.raises(CommandError, match="is not empty"):
        train(data, run, "--table", "--from", str(built))


def test_a_table_stands_beside_a_built_model_only(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--table needs a built model"):
        train(data, tmp_path / "run", "--table")
    with pytest.raises(CommandError, match="no file of corrections"):
        train(tmp_path / "fixes.jsonl", tmp_path / "run", "--table", "--from", "bundled")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [(), ("--from", "bundled", "--table")])
def test_only_trained_weights_are_trained_on_as_a_whole(
    data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    with pytest.raises(CommandError, match="--whole goes on training a model"):
        train(data, tmp_path / "run", "--whole", *more)
    assert not (tmp_path / "run").exists()


def test_trained_weights_learn_questions_again_or_only_polish_answers() -> None:
    from assistant.modelkit.examples import TrainConfig

    new, whole, polish = TrainConfig(), TrainConfig().continued(), TrainConfig().tuning()
    assert new.teach_weight == whole.teach_weight == polish.teach_weight > 0
    assert whole.stage(0.4).answered == 0 < whole.stage(0.6).answered
    assert new.stage(1.0) == whole.stage(0.9) == polish.stage(0.0), "all end with answers"
    assert whole.stage(0.9).answered > whole.stage(0.6).answered
    assert new.learning_rate > whole.learning_rate > polish.learning_rate
    assert (new.fresh, whole.fresh, polish.fresh) == (True, False, False)


def test_equal_seeds_draw_equal_examples(data: Path, trained: tuple[Path, str]) -> None:
    import random

    from assistant.modelkit import train as module
    from assistant.modelkit.tokens import Encoder

    run, _ = trained
    encoder, found = Encoder.load(run / "tokenizer.json"), corpus.build(data)
    drawn = []
    for seed in (1, 1, 2):
        maker = module.ExampleMaker(
            found, encoder, facts.mask, module.TrainConfig(), random.Random(seed)
        )
        drawn.append([maker.draw(at / 50).ids for at in range(50)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_only_the_answer_and_the_question_are_learned_never_the_control_pieces(
    data: Path, trained: tuple[Path, str]
) -> None:
    import random

    from assistant.modelkit import train as module
    from assistant.modelkit.tokens import Encoder

    run, _ = trained
    encoder = Encoder.load(run / "tokenizer.json")
    maker = module.ExampleMaker(
        corpus.build(data), encoder, facts.mask, module.TrainConfig(), random.Random(0)
    )
    answered = 0
    for _ in range(200):
        example = maker.draw(1.0)
        assert example.ids[example.at] == encoder.id(labels.ASSISTANT)
        assert example.targets[example.at] == module.IGNORE, "the hidden token has its own loss"
        if len(example.ids) > example.at + 1:
            answered += 1
            assert example.targets[-1] == module.IGNORE
            assert example.targets[example.at + 1] == example.ids[example.at + 2]
    assert answered > 50


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_an_answer_learns_to_follow_its_intent_also_against_the_question(
    data: Path, trained: tuple[Path, str], share: float
) -> None:
    import random
    from dataclasses import replace

    from assistant.modelkit import train as module
    from assistant.modelkit.examples import ANSWERS
    from assistant.modelkit.tokens import Encoder

    encoder, found = Encoder.load(trained[0] / "tokenizer.json"), corpus.build(data)
    assert found.answers is not None
    config = module.TrainConfig(stages=(replace(ANSWERS, overruled=share),))
    maker = module.ExampleMaker(found, encoder, facts.mask, config, random.Random(0))
    names = {id_: name for name, id_ in maker.intents.items()}
    written = {
        (intent, *encoder.answer(text))
        for intent, texts in found.answers.by_intent(labels.INTENTS).items()
        for text in texts
    }
    drawn = [maker.draw(1.0) for _ in range(600)]
    answered = [(one, names[one.ids[one.at + 1]]) for one in drawn if len(one.ids) > one.at + 1]
    told = [(one, under) for one, under in answered if one.intent != module.IGNORE]
    against = [(one, under) for one, under in told if under != labels.INTENTS[one.intent]]
    assert all((under, *one.ids[one.at + 2 :]) in written for one, under in against)
    assert len(against) == pytest.approx(share * len(told), abs=0.1 * len(told))


def test_questions_are_read_alone_before_answers_and_conversations(
    data: Path, trained: tuple[Path, str]
) -> None:
    import random

    from assistant.modelkit import train as module
    from assistant.modelkit.tokens import Encoder

    run, _ = trained
    encoder = Encoder.load(run / "tokenizer.json")
    maker = module.ExampleMaker(
        corpus.build(data), encoder, facts.mask, module.TrainConfig(), random.Random(0)
    )
    user = encoder.id(labels.USER)
    early = [maker.draw(0.2) for _ in range(200)]
    assert all(example.at == len(example.ids) - 1 for example in early), "no answers"
    assert all(example.ids.count(user) == 1 for example in early), "no histories"
    assert all(set(example.targets) == {module.IGNORE} for example in early)
    late = [maker.draw(0.9) for _ in range(200)]
    marks = set(maker.intents.values())
    talks = [one.ids[: one.at] for one in late if one.ids[: one.at].count(user) > 1]
    marked = [bool(marks & set(ids)) for ids in talks]
    assert any(marked) and not all(marked), "serving meets both forms of a history"


def test_the_projection_to_the_teacher_is_fitted_to_weights_that_are_trained_already(
    data: Path, trained: tuple[Path, str]
) -> None:
    import random

    import torch
    import torch.nn.functional as F  # noqa: N812

    from assistant.modelkit import train as module
    from assistant.modelkit.distil import Teacher
    from assistant.modelkit.student import Shape, Student
    from assistant.modelkit.tokens import Encoder

    found, encoder = corpus.build(data), Encoder.load(trained[0] / "tokenizer.json")
    config = module.TrainConfig()
    maker = module.ExampleMaker(found, encoder, facts.mask, config, random.Random(0))
    texts = [sample.turns[-1].question for sample in found.labelled]
    maker.teacher_index = {text: at for at, text in enumerate(texts)}
    model = Student(Shape(vocab_size=encoder.tokenizer.get_vocab_size()))
    module._load_weights(model, trained[0])
    batch = module.collate([maker.plain(text) for text in texts], "cpu")
    with torch.no_grad():
        states = model(batch.ids)[torch.arange(len(batch.at)), batch.at]
    turn = torch.randn(states.shape[1], 384, generator=torch.Generator().manual_seed(1))
    teacher = Teacher(states @ turn, torch.zeros(0), torch.zeros(0))
    module._aim(model, maker, teacher)
    told = F.cosine_similarity(model.teach(states), states @ turn)
    assert model.training and float(told.detach().mean()) > 0.9


def test_a_stage_says_how_much_is_left_out(tmp_path: Path) -> None:
    from assistant.modelkit.examples import QUESTIONS, WORDS
    from assistant.modelkit.student import Shape, Student

    model = Student(Shape(vocab_size=64))
    for stage in (QUESTIONS, WORDS):
        model.drop_out(stage.dropout)
        assert {one.drop.p for one in [model, *model.layers]} == {stage.dropout}


def test_a_run_made_longer_forgets_what_was_late_in_the_shorter_one(
    tmp_path: Path,
) -> None:
    from dataclasses import replace

    from assistant.modelkit.student import Shape, Student
    from assistant.modelkit.train import Run, TrainConfig

    model, config = Student(Shape(vocab_size=64)), TrainConfig(minutes=1)
    run = Run(model, config, tmp_path)
    run.elapsed_s, run.quality, run.kept, run.judged = 60.0, 0.9, dict(run.average), 8
    run.save()
    same = Run(model, config, tmp_path)
    assert same.resume()
    assert (same.quality, same.judged, same.due()) == (0.9, 8, False)
    longer = Run(model, replace(config, minutes=2), tmp_path)
    assert longer.resume()
    assert (longer.quality, longer.kept, longer.judged) == (0.0, None, 3)


@pytest.mark.parametrize("minutes", ["0", "-5", "nan", "soon"])
def test_a_run_takes_some_time(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="not a number of minutes"):
        train(tmp_path, tmp_path / "run", f"--minutes={minutes}")


def test_a_folder_without_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"support_queries.*is missing.*README"):
        train(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_calibrated_on_is_refused_before_training(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    write(folder, "intents_clinc150", row("clinc150", "tell me a story", "oos"))
    with pytest.raises(CommandError, match="no development rows of the kind out"):
        train(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_to_start_from_that_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"nowhere"):
        train(data, tmp_path / "run", "--from", str(tmp_path / "nowhere"))


def test_cuda_without_a_device_is_refused(data: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(CommandError, match="no CUDA device"):
        train(data, tmp_path / "run", "--device", "cuda")


def test_batches_of_the_built_model_do_not_change_its_answers(trained: tuple[Path, str]) -> None:
    from assistant.modelkit.finish import answers

    run, _ = trained
    engine = Engine(EngineConfig(run / "model", threads=1))
    engine.start()
    try:
        questions = ["cancel my order", "where is my refund", "hello"]
        together = answers(engine, facts.mask, questions)
        alone = [answers(engine, facts.mask, [question])[0] for question in questions]
    finally:
        engine.close()
    assert [reply.intent for reply in together] == [reply.intent for reply in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=0.02)
