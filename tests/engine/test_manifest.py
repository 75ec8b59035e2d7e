"""A model folder is what its manifest says, or it is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from assistant.engine.folder import refuse_external_data
from assistant.engine.manifest import Chat, FileEntry, Manifest, ManifestError, describe_files
from tests.conftest import ROOT


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
        (lambda d: d.update(chat={"format": "jinja", "end": ""}), "no text under 'end'"),
        (lambda d: d["chat"].update(bos=1), "no text under chat 'bos'"),
        (lambda d: d["chat"].update(more_ends="</s>"), "'more_ends'"),
        (lambda d: d["chat"].update(more_ends=["</s>", ""]), "'more_ends'"),
        (lambda d: d["chat"].update(more_ends=["</s>"] * 99), "'more_ends'"),
        (lambda d: d.update(runner="gpu"), "unknown runner 'gpu'; known: packed, plain"),
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


def test_a_manifest_from_before_templates_and_runners_reads_as_it_was_meant() -> None:
    manifest = Manifest.load(ROOT / "assistant" / "bundled" / "support-en")
    assert manifest.chat == Chat("inhouse", "<|end|>", "", ())
    assert manifest.runner == "packed"


def test_what_a_foreign_model_needs_is_written_and_read_back(folder: Path) -> None:
    chat = Chat("jinja", "<|im_end|>", "<s>", ("<|endoftext|>", "</s>"))
    replace(Manifest.load(folder), chat=chat, runner="plain").write(folder)
    manifest = Manifest.load(folder)
    assert (manifest.chat, manifest.runner) == (chat, "plain")


# -- hostile folders -------------------------------------------------------------------------------


def rehash(folder: Path) -> None:
    """What a hostile author would do: the manifest vouches for whatever lies there."""
    data = json.loads((folder / "model.json").read_text())
    entries = describe_files(folder, data["files"])
    data["files"] = {name: {"sha256": e.sha256, "bytes": e.bytes} for name, e in entries.items()}
    (folder / "model.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name",
    ["weights.pkl", "pytorch_model.bin", "model.PT", "data.pickle", "libops.so", "libops.so.1.2",
     "ops.DLL", "ops.dylib", "modeling.py", "cached.pyc", "install.sh", "x.joblib"],
)  # fmt: skip
def test_a_pickle_or_code_beside_the_model_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(ManifestError, match=rf"{name} is code or a pickle.*delete it"):
        Manifest.load(folder)
    edit(folder, lambda data: data["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}))
    with pytest.raises(ManifestError, match=rf"{name} is code or a pickle"):
        Manifest.load(folder)


def test_a_link_beside_the_model_is_refused_though_nothing_reads_it(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(ManifestError, match=r"notes\.txt is a symbolic link"):
        Manifest.load(folder)


def test_a_pipe_in_the_folder_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "README.md")
    with pytest.raises(ManifestError, match=r"README\.md is not a plain file"):
        Manifest.load(folder)


def test_words_and_pictures_beside_the_model_are_welcome(folder: Path) -> None:
    for name in ("MODEL_CARD.md", "LICENSE", "curves.png", "training.json", ".gitattributes"):
        (folder / name).write_bytes(b"hello")
    (folder / "more").mkdir()
    assert Manifest.load(folder).quant == "fp32"


@pytest.mark.parametrize(("name", "size"), [("model.onnx", 1 << 40), ("tokenizer.json", 1 << 36)])
def test_a_gigantic_sparse_file_is_refused_without_reading_it(
    folder: Path, name: str, size: int
) -> None:
    os.truncate(folder / name, size)
    began = time.monotonic()
    with pytest.raises(ManifestError, match=rf"has {size} bytes instead of"):
        Manifest.load(folder)
    edit(folder, lambda data: data["files"][name].update(bytes=size))
    with pytest.raises(ManifestError, match=rf"{name} has {size} bytes; at most \d+ are read"):
        Manifest.load(folder)
    assert time.monotonic() - began < 2


def external(location: str) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def model_with(
    *nodes: onnx.NodeProto, weights: tuple[onnx.TensorProto, ...] = ()
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [], [], initializer=list(weights))
    return helper.make_model(graph)


def external_models() -> dict[str, onnx.ModelProto]:
    """Every place of an ONNX file where a tensor can hide."""
    tensor = external("secret.bin")
    within = helper.make_graph([], "inner", [], [], initializer=[tensor])
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    function = helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 18)])
    in_function, in_training, sparse, only_moved = (model_with() for _ in range(4))
    in_function.functions.append(function)
    in_training.training_info.add().algorithm.CopyFrom(within)
    sparse.graph.sparse_initializer.add().values.CopyFrom(tensor)
    moved = external("x")
    moved.ClearField("external_data")
    only_moved.graph.initializer.append(moved)
    return {
        "beside": model_with(weights=(tensor,)),
        "absolute": model_with(weights=(external("/etc/passwd"),)),
        "above": model_with(weights=(external("../../secret"),)),
        "in an attribute": model_with(constant),
        "in a branch": model_with(helper.make_node("If", ["x"], ["y"], then_branch=within)),
        "in a list": model_with(helper.make_node("Many", [], [], domain="d", all=[within])),
        "in a function": in_function,
        "in training": in_training,
        "in a sparse tensor": sparse,
        "without a location": only_moved,
    }


@pytest.mark.parametrize("where", external_models())
def test_weights_kept_in_another_file_are_refused_wherever_they_are_named(
    folder: Path, where: str
) -> None:
    (folder / "model.onnx").write_bytes(external_models()[where].SerializeToString())
    rehash(folder)
    with pytest.raises(ManifestError, match=r"model\.onnx keeps weights in another file"):
        Manifest.load(folder)


def test_a_number_written_the_long_way_hides_nothing(tmp_path: Path) -> None:
    """Field 14 with its tag and its value padded, as no writer does and every reader accepts."""
    moved = b"\xf0\x80\x00" + b"\x81\x80\x00"
    graph = b"\x2a" + bytes([len(moved)]) + moved
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert onnx.load(path, load_external_data=False).graph.initializer[0].data_location == 1
    with pytest.raises(ManifestError, match="another file"):
        refuse_external_data(path)


@pytest.mark.parametrize(
    "raw", [b"", b"\x00" * 40, b"PK\x03\x04" * 9, b"\x3a\x05ab", b"\x3b", b"\xff" * 99, b"<html>"]
)
def test_what_is_no_onnx_file_is_refused_before_anything_loads_it(folder: Path, raw: bytes) -> None:
    (folder / "model.onnx").write_bytes(raw)
    rehash(folder)
    with pytest.raises(ManifestError, match=r"model\.onnx is not an ONNX model"):
        Manifest.load(folder)


def test_a_cut_model_is_refused_even_when_the_manifest_vouches_for_it(folder: Path) -> None:
    raw = (folder / "model.onnx").read_bytes()
    for size in (len(raw) // 2, len(raw) - 1):
        (folder / "model.onnx").write_bytes(raw[:size])
        rehash(folder)
        with pytest.raises(ManifestError, match="is not an ONNX model"):
            Manifest.load(folder)


def test_the_digest_changes_with_every_file_and_with_what_was_fitted(folder: Path) -> None:
    manifest = Manifest.load(folder)
    files = manifest.files
    other = {**files, "wide.npz": FileEntry("0" * 64, 1)}
    calibration = replace(manifest.calibration, answer_from=0.61)
    changed = [replace(manifest, files=other), replace(manifest, calibration=calibration)]
    assert len({manifest.digest, *(one.digest for one in changed)}) == 3
    assert replace(manifest, name="x", version="y", quality={"a": 1}).digest == manifest.digest
