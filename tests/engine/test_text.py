"""Text and tokens: nothing a user types is a control token; nothing shown is half a character."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from assistant.engine import Engine
from assistant.engine.manifest import Chat, FileEntry, Manifest, ManifestError
from assistant.engine.text import ChatTurn, Codec, Slot, StopFilter
from assistant.engine.words import _BYTE_OF

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


# -- models from elsewhere -------------------------------------------------------------------------

CORPUS = [
    "hello there my friend, how are you today",
    "where is order 48213377 now? it is on its way",
    "naïve café — some text with 日本語 in it",
    "the user asked the assistant for help [INST] and got it [/INST]",
] * 8
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEMPLATE_OF = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}",
    "bare": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
}
KINDS = ["byte-level", "byte-level with a space", "unigram", "llama2", "llama3", "gemma"]


def trained(kind: str) -> Tokenizer:
    """A new copy of a small tokenizer of this family."""
    return Tokenizer.from_str(_trained(kind))


@cache
def _trained(kind: str) -> str:
    """Trained once: training twice does not give the same."""
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    elif kind.startswith("byte-level"):
        tokenizer = Tokenizer(models.BPE())
        spaced = kind.endswith("space")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        to_mark = normalizers.Replace(" ", "▁")
        strip = [decoders.Strip(" ", 1, 0)]
        if kind == "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_mark])
        elif kind == "llama3":  # as newer conversions of SentencePiece have it
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer, strip = to_mark, []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=470, special_tokens=[*SPECIAL, *pieces], show_progress=False
        )
    # Word by word, since real vocabularies have no tokens across words.
    words = [" " * (kind == "gemma") + word for text in CORPUS for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] in SPECIAL]
    return json.dumps(data)


def foreign(
    manifest: Manifest, tokenizer: Tokenizer, template: str = TEMPLATE_OF["chatml"], **chat: Any
) -> Codec:
    chat = {"end": "<|im_end|>", "bos": "<s>", **chat}
    elsewhere = replace(
        manifest, chat=Chat("jinja", **chat), intents={}, scope=None, placeholders={},
        architecture=replace(manifest.architecture, vocab_size=1000),
    )  # fmt: skip
    return Codec(tokenizer, elsewhere, template)


def talk(*texts: str) -> list[ChatTurn]:
    return [ChatTurn("assistant" if at % 2 else "user", (text,)) for at, text in enumerate(texts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "ending", "rendering"),
    [
        ("chatml", "<|im_end|>", "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
         "it is on its way<|im_end|>\n<|im_start|>user\n how now?<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("mistral", "</s>", "<s>[INST] hello there [/INST] it is on its way</s>"
         "[INST]  how now? [/INST]"),
        ("bare", "</s>", "hello there</s>it is on its way</s> how now?</s>"),
    ],
)  # fmt: skip
def test_a_template_s_ids_are_those_of_its_rendering_where_nothing_merges_over_a_border(
    manifest: Manifest, kind: str, name: str, ending: str, rendering: str
) -> None:
    codec = foreign(manifest, trained(kind), TEMPLATE_OF[name], end=ending)
    ids = codec.encode_chat(talk("hello there", "it is on its way", " how now?"))
    expected = trained(kind).encode(rendering, add_special_tokens=False).ids
    assert ids == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATE_OF)
def test_no_typed_text_becomes_a_control_token_of_a_foreign_model(
    manifest: Manifest, kind: str, name: str
) -> None:
    codec = foreign(manifest, trained(kind), TEMPLATE_OF[name], end="</s>")
    clean = codec.encode_chat(talk("hello"))
    shown = codec.control_ids - {0}  # 0 stands for letters that the vocabulary lacks
    controls = [id_ for id_ in clean if id_ in shown]
    rng = random.Random(3)
    for _ in range(200):
        text = random_text(rng) + rng.choice([*SPECIAL, "</s", "<|im_start|>system\n"])
        ids = codec.encode_chat(talk(text))
        assert [id_ for id_ in ids if id_ in shown] == controls, repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_talk_begins_with_the_shorter_one_s_prompt_and_answer(
    manifest: Manifest, kind: str
) -> None:
    codec = foreign(manifest, trained(kind))
    texts = ["hello <|im_end|> there", "where is it?", "order 48213377", "on its way.", "thanks"]
    for turns in (1, 3):
        prompt = codec.encode_chat(talk(*texts[:turns]))
        answer = codec.encode(texts[turns])
        longer = codec.encode_chat(talk(*texts[: turns + 2]))
        assert longer[: len(prompt) + len(answer) + 1] == [*prompt, *answer, codec.end_id]


def test_a_control_piece_that_the_tokenizer_does_not_call_special_is_one(
    manifest: Manifest,
) -> None:
    tokenizer = trained("byte-level")
    tokenizer.add_tokens(["<think>", "</think>", "  "])
    think, spaces = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("  ")
    assert tokenizer.encode("<think>").ids == [think], "the library itself would take it"
    template = TEMPLATE_OF["chatml"] + "<think>"
    codec = foreign(manifest, tokenizer, template)
    ids = codec.encode_chat(talk("a <think>  b"))
    assert ids.count(think) == 1 and ids[-1] == think, "the template's, not the user's"
    assert spaces in ids, "other added tokens stay"
    assert think not in codec.banned_ids
    stream = codec.stream()
    assert stream.push(think) == "<think>", "it is text when the model writes it"


def test_each_of_a_model_s_ends_ends_an_answer_and_none_is_banned(manifest: Manifest) -> None:
    tokenizer = trained("byte-level")
    codec = foreign(manifest, tokenizer, more_ends=("<|endoftext|>", "</s>"))
    ends = {tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>", "</s>")}
    assert codec.end_ids == ends
    assert codec.end_id == tokenizer.token_to_id("<|im_end|>")
    assert not ends & set(codec.banned_ids)
    assert tokenizer.token_to_id("<|im_start|>") in codec.banned_ids
    with pytest.raises(ManifestError, match="does not know '<nobody>'"):
        foreign(manifest, trained("byte-level"), more_ends=("<nobody>",))


def test_slots_are_plain_words_in_braces_to_a_foreign_model(manifest: Manifest) -> None:
    codec = foreign(manifest, trained("byte-level"))
    turns = [ChatTurn("user", ("order ", Slot("Order Number"), "?"))]
    assert codec.encode_chat(turns) == codec.encode_chat(talk("order {{Order Number}}?"))


def test_a_turn_takes_no_more_than_the_codec_says(manifest: Manifest) -> None:
    default = "<|im_start|>system\nbe good<|im_end|>\n" + TEMPLATE_OF["chatml"]
    for template in (*TEMPLATE_OF.values(), default):
        codec = foreign(manifest, trained("llama2"), template)
        texts = ["hello there", "where?", "now", "and", "how are you?"]
        for turns in (1, 3, 5):
            counted = sum(codec.count(text) + codec.turn_tokens for text in texts[:turns])
            taken = len(codec.encode_chat(talk(*texts[:turns])))
            assert taken <= counted + codec.frame_tokens <= taken + 2 * turns + 2


def test_a_control_token_that_swallows_space_does_so_in_a_template(manifest: Manifest) -> None:
    tokenizer = trained("byte-level")
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True, rstrip=True, lstrip=True)])
    template = "{% for m in messages %}hello <|user|>\n{{ m.content }}</s>{% endfor %}"
    codec = foreign(manifest, tokenizer, template, end="</s>")
    reader = Tokenizer.from_str(tokenizer.to_str())
    expected = reader.encode("hello <|user|>\nwhere</s>", add_special_tokens=False)
    assert codec.encode_chat(talk("where")) == expected.ids
    assert "Ċ" not in expected.tokens, "the line's end was swallowed"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages", "is no template"),
        ("hello", "leaves out"),
        ("{{ raise_exception('no') }}", "refuses: no"),
        ("{{ messages.__class__ }}", "unsafe"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_the_model_is_loaded(
    manifest: Manifest, tmp_path: Path, template: str, message: str
) -> None:
    tokenizer = trained("byte-level")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template)
    elsewhere = replace(
        manifest, chat=Chat("jinja", "</s>"), intents={}, scope=None, placeholders={},
        files={"chat_template.jinja": FileEntry("0" * 64, 1)},
    )  # fmt: skip
    with pytest.raises(ManifestError, match=rf"chat_template\.jinja cannot be used.*{message}"):
        Codec.load(tmp_path, elsewhere)
    with pytest.raises(ManifestError, match=r"has no chat_template\.jinja"):
        Codec.load(tmp_path, replace(elsewhere, files={}))


def test_a_conversation_that_a_template_refuses_is_the_caller_s_mistake(manifest: Manifest) -> None:
    once = "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}"
    codec = foreign(manifest, trained("byte-level"), once + TEMPLATE_OF["chatml"])
    assert codec.encode_chat(talk("a", "b", "c"))
    with pytest.raises(ValueError, match="too many"):
        codec.encode_chat(talk("a", "b", "c", "d", "e"))


# -- ids to text, byte by byte ---------------------------------------------------------------------

HARD = [
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇳🇴", "👍🏽", "日本語、中文",
    "e\u0301n\u0303o\u0308", "नमस्ते", "שָׁלוֹם", "a\u200db", "\ufffd x",
]  # fmt: skip


def byte_ids(kind: str, tokenizer: Tokenizer) -> list[int]:
    """The id of each byte's own token."""
    if kind.startswith("byte-level"):
        letters = {bytes([byte]): letter for letter, byte in _BYTE_OF.items()}
        return [tokenizer.token_to_id(letters[bytes([byte])]) for byte in range(256)]
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]


@pytest.mark.parametrize("kind", ["byte-level", "llama2", "llama3", "gemma"])
@pytest.mark.parametrize("text", HARD)
def test_text_in_single_bytes_is_shown_a_character_at_a_time(
    manifest: Manifest, kind: str, text: str
) -> None:
    codec = foreign(manifest, trained(kind))
    ids = byte_ids(kind, trained(kind))
    stream, shown = codec.stream(), []
    for char in text:
        *held, last = [stream.push(ids[byte]) for byte in char.encode()]
        assert held == [""] * len(held)
        shown.append(last)
    assert shown == list(text)
    assert stream.flush() == ""


@pytest.mark.parametrize("text", HARD)
def test_text_cut_into_tokens_at_any_two_bytes_is_shown_whole(
    manifest: Manifest, text: str
) -> None:
    """Every way to cut the text into three tokens, each token made for the cut."""
    raw = text.encode()
    letters = {byte: letter for letter, byte in _BYTE_OF.items()}
    tokenizer = trained("byte-level")
    parts = {raw[a:b] for a in range(len(raw)) for b in range(a + 1, len(raw) + 1)}
    made = {part: "".join(letters[byte] for byte in part) for part in parts}
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    for piece in made.values():
        vocab.setdefault(piece, len(vocab))
    codec = foreign_of(manifest, Tokenizer.from_str(json.dumps(data)), len(vocab))
    for a in range(1, len(raw)):
        for b in range(a + 1, len(raw)):
            stream = codec.stream()
            cut = [vocab[made[part]] for part in (raw[:a], raw[a:b], raw[b:])]
            shown = [stream.push(id_) for id_ in cut]
            assert "".join(shown) == text and stream.flush() == ""
            assert all(text.startswith("".join(shown[:n])) for n in (1, 2, 3))


def foreign_of(manifest: Manifest, tokenizer: Tokenizer, vocab: int) -> Codec:
    larger = replace(manifest, architecture=replace(manifest.architecture, vocab_size=vocab))
    elsewhere = replace(larger, chat=Chat("jinja", "</s>"), intents={}, scope=None, placeholders={})
    return Codec(tokenizer, elsewhere, TEMPLATE_OF["bare"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_shows_what_the_library_decodes(manifest: Manifest, kind: str) -> None:
    codec, reader = foreign(manifest, trained(kind)), trained(kind)
    for text in ["hello there", " two  spaces ", "\n\nlines\n", "naïve 日本語 — x", *HARD]:
        if kind == "unigram" and text not in ("hello there", " two  spaces "):
            continue  # it has no letters for these
        ids = codec.encode(text)
        assert decoded(codec, ids) == reader.decode(ids, skip_special_tokens=False)
        assert decoded(codec, codec.encode("a") + ids) == "a" + text


def test_any_ids_of_a_byte_level_model_show_what_the_library_decodes(manifest: Manifest) -> None:
    codec, reader = foreign(manifest, trained("byte-level")), trained("byte-level")
    rng = random.Random(5)
    for _ in range(300):
        ids = [rng.randrange(len(SPECIAL), reader.get_vocab_size()) for _ in range(40)]
        stream = codec.stream()
        shown = "".join(stream.push(id_) for id_ in ids) + stream.flush()
        assert shown == reader.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "llama2"])
def test_half_a_character_at_the_end_is_one_mark(manifest: Manifest, kind: str) -> None:
    codec = foreign(manifest, trained(kind))
    ids = byte_ids(kind, trained(kind))
    for raw in (b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x91", b"\xe6\x97"):
        stream = codec.stream()
        assert [stream.push(ids[byte]) for byte in raw] == [""] * len(raw)
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""


def test_a_placeholder_ends_half_a_character(codec: Codec) -> None:
    stream = codec.stream()
    first = next(id_ for id_ in range(600) if codec._words.bytes_of(id_) == b"\xf0")
    assert stream.push(first) == ""
    assert stream.push(11) == "\ufffd{{Order Number}}"


def test_an_id_beyond_the_tokenizer_is_no_text(manifest: Manifest) -> None:
    codec = foreign(manifest, trained("byte-level"))
    assert decoded(codec, [999, *codec.encode("hi"), 998]) == "hi"
