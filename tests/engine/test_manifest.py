"""A model folder is what its manifest says, or it is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assistant.engine.manifest import FileEntry, Manifest, ManifestError, describe_files


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["fp32"], tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "model.json").read_text())
    change(data)
    (folder / "model.json").write_text(json.dumps(data))


def test_a_whole_folder_loads_and_reads_back_as_it_was_written(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.quant == "fp32"
    assert manifest.architecture.vocab_size == 512
    again = folder.parent / "again"
    again.mkdir()
    manifest.write(again)
    assert Manifest.parse((again / "model.json").read_text(), again) == manifest


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "model.json"])
def test_a_missing_file_is_named_with_the_cure(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ManifestError, match=rf"{name} is missing.*git checkout -- .*build_model"):
        Manifest.load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    raw = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(raw[:-1])
    with pytest.raises(ManifestError, match=r"model\.onnx has \d+ bytes instead of"):
        Manifest.load(folder)


def test_an_altered_file_of_the_same_size_is_named(folder: Path) -> None:
    raw = bytearray((folder / "tokenizer.json").read_bytes())
    raw[40] ^= 1
    (folder / "tokenizer.json").write_bytes(raw)
    with pytest.raises(ManifestError, match=r"tokenizer\.json was altered"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.json"])
def test_a_symbolic_link_is_refused_even_to_the_right_bytes(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(ManifestError, match="symbolic link"):
        Manifest.load(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()
    with pytest.raises(ManifestError, match="not a plain file"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\x00"])
def test_names_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    edit(folder, lambda data: data["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(ManifestError, match="must lie in the folder itself"):
        Manifest.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 2}', "{}"])
def test_what_is_no_manifest_is_refused_as_such(folder: Path, text: str) -> None:
    (folder / "model.json").write_text(text)
    with pytest.raises(ManifestError, match=r"model\.json (is not JSON|has format)"):
        Manifest.load(folder)


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "model.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ManifestError, match="cannot be read"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(quant="dynamic"), "another's answer"),
        (lambda d: d.update(quant="int3"), "unknown quant"),
        (lambda d: d.pop("quant"), "lacks 'quant'"),
        (lambda d: d.pop("files"), "lacks 'files'"),
        (lambda d: d.update(files={}), r"does not list model\.onnx"),
        (lambda d: d.update(files=[]), "no object under 'files'"),
        (lambda d: d["files"].update({"model.onnx": "abc"}), "model.json"),
        (lambda d: d["files"]["model.onnx"].update(sha256="zz"), "no SHA-256"),
        (lambda d: d["files"]["model.onnx"].update(bytes=-1), "whole number"),
        (lambda d: d["architecture"].update(vocab_size="512"), "whole number"),
        (lambda d: d["architecture"].update(num_hidden_layers=True), "whole number"),
        (lambda d: d["architecture"].update(rope_theta=None), "not a number"),
        (lambda d: d["intents"].update(cancel_order=512), "outside the vocabulary"),
        (lambda d: d.update(scope={"in": 5}), "lacks 'out'"),
        (lambda d: d.update(chat={"format": "magic", "end": "x"}), "unknown chat format"),
        (lambda d: d["calibration"].update(temperature=0), "not above 0"),
        (lambda d: d["calibration"].update(surprise=1), "surprise"),
        (lambda d: d.update(context_tokens=0), "whole number"),
        (lambda d: d.update(smalltalk=3), "model.json"),
    ],
)
def test_a_wrong_field_is_named(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(ManifestError, match=message):
        Manifest.load(folder)


@pytest.mark.parametrize("op", [b"DynamicQuantizeMatMul", b"DynamicQuantizeLinear"])
def test_a_dynamically_quantised_graph_is_refused_whatever_the_manifest_says(
    folder: Path, op: bytes
) -> None:
    padding = b"\x00" * ((1 << 20) - 10)  # the mark lies across two blocks of reading
    (folder / "model.onnx").write_bytes(padding + bytes([0x22, len(op)]) + op + b"\x00" * 99)
    entries = describe_files(folder)
    edit(
        folder,
        lambda data: data.update(
            files={name: {"sha256": e.sha256, "bytes": e.bytes} for name, e in entries.items()}
        ),
    )
    with pytest.raises(ManifestError, match="quantised dynamically"):
        Manifest.load(folder)


def test_a_manifest_that_could_not_be_read_back_is_not_written(folder: Path) -> None:
    before = (folder / "model.json").read_bytes()
    manifest = Manifest.load(folder)
    with pytest.raises(ManifestError, match="dynamic"):
        replace(manifest, quant="dynamic").write(folder)
    with pytest.raises(ManifestError, match="folder itself"):
        replace(manifest, files={"../x": FileEntry("0" * 64, 1)}).write(folder)
    assert (folder / "model.json").read_bytes() == before


def test_the_first_token_rule_leaves_out_of_scope_out_of_the_intents(folder: Path) -> None:
    manifest = Manifest.load(folder)
    rule = manifest.first_token_rule()
    assert rule is not None
    assert rule.out_of_scope_id == manifest.intents["out_of_scope"]
    assert rule.out_of_scope_id not in rule.intent_ids
    assert len(rule.intent_ids) == len(manifest.intents) - 1
    assert replace(manifest, scope=None).first_token_rule() is None
