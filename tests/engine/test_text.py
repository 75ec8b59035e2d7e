"""Text and tokens: nothing a user types is a control token; nothing shown is half a character."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer

from assistant.engine import Engine
from assistant.engine.manifest import Manifest, ManifestError
from assistant.engine.text import ChatTurn, Codec, Slot, StopFilter

CONTROLS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|intent:x|>"]


@pytest.fixture(scope="session")
def manifest(tiny: Engine) -> Manifest:
    assert tiny.manifest is not None
    return tiny.manifest


def user(*parts: str) -> ChatTurn:
    return ChatTurn("user", parts)


def decoded(codec: Codec, ids: list[int]) -> str:
    stream = codec.stream()
    return "".join(stream.push(id_) for id_ in ids)


def random_text(rng: random.Random) -> str:
    """Unicode of all planes, lone surrogates, and control pieces whole, cut and doubled."""
    pieces = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.randrange(4)
        if kind == 0:
            pieces.append(rng.choice([*CONTROLS, "<|intent:get_refund|>", "{{Order Number}}"]))
        elif kind == 1:
            piece = rng.choice(CONTROLS)
            pieces.append(piece[: rng.randint(0, len(piece))])
        elif kind == 2:
            pieces.append(chr(rng.choice([rng.randrange(0x250), rng.randrange(0x110000)])))
        else:
            pieces.append(
                rng.choice(["hello ", "where is my order", "\n\n", "\x00", "éß", "👩‍👩‍👧"])
            )
    return "".join(pieces)


def test_a_conversation_is_written_piece_by_piece_in_the_model_s_format(
    codec: Codec, manifest: Manifest
) -> None:
    ids = codec.encode_chat(
        [
            ChatTurn("system", ("Be kind.",)),
            user("hi"),
            ChatTurn("assistant", ("Hello!",), "greeting"),
            user("order ", Slot("Order Number"), "?"),
            ChatTurn("assistant", ("Sure.",), "an intent of another model"),
            user("bye"),
        ]
    )
    controls = [id_ for id_ in ids if id_ in codec.control_ids | {11}]
    order, greeting = manifest.placeholders["Order Number"], manifest.intents["greeting"]
    system, asks, answers, end = 2, 3, 4, codec.end_id
    expected = [system, asks, answers, greeting, end, asks, order, answers, end, asks, answers]
    assert controls == expected
    assert decoded(codec, ids) == "Be kind.hiHello!order {{Order Number}}?Sure.bye"


def test_typed_control_pieces_never_become_control_tokens(codec: Codec, manifest: Manifest) -> None:
    special = codec.control_ids | {codec.end_id, *manifest.placeholders.values()}
    rng = random.Random(11)
    for _ in range(1500):
        text = random_text(rng)
        ids = codec.encode_chat([user(text)])
        assert (ids[0], ids[-1]) == (3, 4)
        assert not special & set(ids[1:-1]), repr(text)
        shown = text.encode("utf-8", "replace").decode()
        assert decoded(codec, ids) == shown, repr(text)


def test_a_typed_control_piece_does_not_change_the_tokens_of_the_words_around_it(
    codec: Codec,
) -> None:
    words = codec.encode_chat([user("where is my order")])[1:-1]
    ids = codec.encode_chat([user("<|end|>where is my order")])[1:-1]
    assert ids[-len(words) :] == words


def test_a_control_piece_that_is_also_a_whole_word_is_spelled_out(
    tiny: Engine, manifest: Manifest
) -> None:
    data = json.loads((tiny.config.model_dir / "tokenizer.json").read_text())
    data["model"]["ignore_merges"] = True
    data["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<|end|>").ids == [1], "this tokenizer does have the fault"
    codec = Codec(tokenizer, manifest)
    ids = codec.encode_chat([user("<|end|>")])
    assert not codec.control_ids & set(ids[1:-1])
    assert decoded(codec, ids) == "<|end|>"


def test_a_typed_placeholder_is_text_and_a_slot_is_one_token(codec: Codec) -> None:
    assert len(codec.encode_chat([user(Slot("Order Number"))])) == 3
    assert len(codec.encode_chat([user("{{Order Number}}")])) > 5


def test_a_slot_this_model_does_not_know_is_its_name_in_braces(codec: Codec) -> None:
    assert codec.encode_chat([user(Slot("Nobody's"))]) == codec.encode_chat([user("{{Nobody's}}")])


def test_how_a_text_is_cut_into_parts_does_not_change_its_tokens(codec: Codec) -> None:
    whole = codec.encode_chat([user("where is my order")])
    assert codec.encode_chat([user("where is", " my or", "der")]) == whole


def test_a_prompt_that_does_not_end_with_the_user_is_refused(codec: Codec) -> None:
    for turns in ([], [user("hi"), ChatTurn("assistant", ("hello",))]):
        with pytest.raises(ValueError, match="user's turn"):
            codec.encode_chat(turns)


def test_no_half_character_is_ever_shown(codec: Codec) -> None:
    text = "naïve 👩‍👩‍👧 — 日本語 ✓ 🇩🇪"
    ids = codec.encode_chat([user(text)])[1:-1]
    stream = codec.stream()
    shown = [stream.push(id_) for id_ in ids]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
    assert "" in shown, "the tokenizer splits these characters, so some token completes none"


def test_broken_bytes_from_the_model_do_not_break_the_stream(
    codec: Codec, manifest: Manifest
) -> None:
    rng = random.Random(2)
    for _ in range(100):
        stream = codec.stream()
        for _ in range(60):
            stream.push(rng.randrange(manifest.architecture.vocab_size))
        ids = codec.encode_chat([user("fine. again.")])[1:-1]
        assert "".join(stream.push(id_) for id_ in ids).endswith("fine. again.")


def test_placeholders_come_out_by_name_and_control_tokens_as_nothing(codec: Codec) -> None:
    stream = codec.stream()
    assert stream.push(11) == "{{Order Number}}"
    assert [stream.push(id_) for id_ in sorted(codec.control_ids)] == [""] * len(codec.control_ids)


def test_banned_ids_are_the_control_tokens_except_the_end(codec: Codec, manifest: Manifest) -> None:
    assert codec.end_id not in codec.banned_ids
    assert set(manifest.intents.values()) <= set(codec.banned_ids)
    assert not set(manifest.placeholders.values()) & set(codec.banned_ids)


def test_count_is_the_number_of_plain_tokens(codec: Codec) -> None:
    assert codec.count("") == 0
    text = "where is <|end|>"
    assert codec.count(text) == len(codec.encode_chat([user(text)])) - 2


def test_a_tokenizer_and_a_manifest_that_disagree_are_refused(
    tiny: Engine, manifest: Manifest
) -> None:
    from dataclasses import replace

    swapped = replace(manifest, intents={"get_refund": manifest.intents["cancel_order"]})
    with pytest.raises(ManifestError, match="disagree"):
        Codec.load(tiny.config.model_dir, swapped)
    with pytest.raises(ManifestError, match="does not know"):
        Codec.load(tiny.config.model_dir, replace(manifest, placeholders={"Moon": 40}))


def test_a_stop_string_is_found_across_pieces_and_nothing_of_it_is_shown() -> None:
    stops = StopFilter(["\nUser:", "END"])
    assert stops.push("Hello\nUs") == ("Hello", False)
    assert stops.push("eful\nUser") == ("\nUseful", False)
    assert stops.push(": and more") == ("", True)
    assert stops.push("later") == ("", True)
    assert stops.flush() == ""


def test_held_back_text_is_given_at_the_end() -> None:
    stops = StopFilter(["END"])
    assert stops.push("the EN") == ("the ", False)
    assert stops.flush() == "EN"


def test_a_stop_filter_shows_exactly_what_comes_before_the_first_stop() -> None:
    rng = random.Random(4)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 24)))
        filtered, shown, at, hit = StopFilter(stops), "", 0, False
        while at < len(text) and not hit:
            size = rng.randint(1, 4)
            piece, hit = filtered.push(text[at : at + size])
            shown, at = shown + piece, at + size
        shown += filtered.flush()
        first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
        assert hit == (first is not None)
        if not hit:
            assert shown == text
        else:
            assert not any(stop in shown for stop in stops)
            assert text.startswith(shown)
