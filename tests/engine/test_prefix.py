"""What is kept of finished answers: found by ids, by its own caller only, within a bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assistant.engine.prefix import _MOST_OF_A_SCOPE, Hit, Kept, PrefixCache

ROOMY = 1 << 20


def kept(ids: Sequence[int], start: int = 0, owner: int = 0) -> Kept:
    """An entry whose saved cache says, token by token, what it belongs to."""
    saved = (np.array(ids[start:], np.int64), np.full(len(ids) - start, owner, np.int64))
    return Kept(np.array(ids, np.int64), start, saved)


def size(tokens: int) -> int:
    """Bytes of an entry with that many tokens and no shared prefix."""
    return kept([0] * tokens).bytes


def cached(*entries: Sequence[int], scope: str = "ana", most_bytes: int = ROOMY) -> PrefixCache:
    cache = PrefixCache(most_bytes)
    for ids in entries:
        cache.keep(scope, kept(ids))
    return cache


def found(cache: PrefixCache, prompt: Sequence[int], scope: str = "ana") -> int:
    return cache.find(scope, prompt).tokens


# -- finding ---------------------------------------------------------------------------------------


def test_the_longest_common_beginning_is_found() -> None:
    cache = cached([1, 2, 3, 4], [1, 2, 9, 9, 9, 9])
    assert found(cache, [1, 2, 3, 4, 5, 6]) == 4
    assert found(cache, [1, 2, 9, 9, 4, 4]) == 4
    assert found(cache, [1, 2, 9, 4, 4, 4]) == 3
    assert found(cache, [7, 2, 3, 4, 5, 6]) == 0
    hit = cache.find("ana", [1, 2, 9, 9, 9, 9, 1, 1])
    assert hit.kept is not None and hit.kept.ids.tolist() == [1, 2, 9, 9, 9, 9]


@pytest.mark.parametrize("length", range(1, 9))
def test_all_of_a_prompt_is_never_reused_nor_all_but_one_token(length: int) -> None:
    """Its last token must run to give a next one, and a chunk of one is rounded differently."""
    ids = [5, 6, 7, 8, 9, 1, 2, 3]
    prompt = ids[:length]
    assert found(cached(ids), prompt) == max(0, length - 2)
    shared = PrefixCache(ROOMY)
    shared.share(kept(ids[:4]))
    assert found(shared, prompt) == (4 if length >= 6 else 0)


def test_another_caller_finds_nothing() -> None:
    cache = cached([1, 2, 3, 4, 5])
    for scope in ("ben", "", "an", "ana ", "Ana"):
        assert cache.find(scope, [1, 2, 3, 4, 5, 6, 7]) == Hit(0)
    assert found(cache, [1, 2, 3, 4, 5, 6, 7]) == 5


def test_an_empty_cache_finds_nothing() -> None:
    assert PrefixCache(ROOMY).find("ana", [1, 2, 3]) == Hit(0)


# -- the shared prefix -----------------------------------------------------------------------------


def test_the_shared_prefix_is_found_by_everybody_who_begins_with_all_of_it() -> None:
    cache = PrefixCache(ROOMY)
    cache.share(kept([1, 2, 3, 4]))
    for scope in ("ana", "ben", ""):
        assert cache.find(scope, [1, 2, 3, 4, 5, 6]) == Hit(4)
        assert cache.find(scope, [1, 2, 3, 5, 5, 6]) == Hit(0)
        assert cache.find(scope, [1, 2, 3]) == Hit(0)
    assert [cache.starts_shared(ids) for ids in ([1, 2, 3, 4], [1, 2, 3], [2, 2, 3, 4])] == [
        4,
        0,
        0,
    ]


def test_a_chat_behind_the_shared_prefix_is_found_from_there_on() -> None:
    cache = PrefixCache(ROOMY)
    cache.share(kept([1, 2, 3, 4]))
    chat = kept([1, 2, 3, 4, 5, 6, 7], start=4)
    cache.keep("ana", chat)
    assert cache.find("ana", [1, 2, 3, 4, 5, 6, 7, 8, 9]) == Hit(7, chat)
    assert cache.find("ana", [1, 2, 3, 4, 5, 9, 9, 9, 9]) == Hit(5, chat)
    assert cache.find("ana", [1, 2, 3, 4, 9, 9, 9, 9, 9]) == Hit(4), "the prefix says it all"
    assert cache.find("ben", [1, 2, 3, 4, 5, 6, 7, 8, 9]) == Hit(4)
    assert cache.find("ana", [1, 2, 3]) == Hit(0), "what stands on the prefix needs all of it"


def test_another_shared_prefix_drops_what_stood_on_the_last_one() -> None:
    cache = PrefixCache(ROOMY)
    cache.share(kept([1, 2, 3, 4]))
    cache.keep("ana", kept([1, 2, 3, 4, 5, 6, 7], start=4))
    cache.keep("ben", kept([8, 8, 8, 8, 8, 8]))
    cache.share(kept([1, 2]))
    assert (len(cache), cache.bytes) == (0, 0)
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == 2
    assert found(cache, [8] * 9, "ben") == 0


# -- keeping ---------------------------------------------------------------------------------------


def test_the_next_turn_of_a_chat_takes_the_place_of_the_last_one() -> None:
    cache = cached([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7])
    assert (len(cache), cache.bytes) == (1, size(7))
    cache.keep("ana", kept([1, 2, 3, 4, 5, 6, 7]))
    assert (len(cache), cache.bytes) == (1, size(7)), "the same turn asked again"
    cache.keep("ben", kept([1, 2, 3, 4, 5, 6, 7, 8]))
    assert len(cache) == 2, "another caller's chat is another chat"


def test_a_chat_that_went_another_way_is_kept_beside_the_first() -> None:
    cache = cached([1, 2, 3, 4], [1, 2, 9, 9])
    assert len(cache) == 2
    assert found(cache, [1, 2, 3, 4, 5, 5]) == found(cache, [1, 2, 9, 9, 5, 5]) == 4


def test_the_bound_is_kept_and_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(size(5) * 3)
    for scope, token in (("ana", 1), ("ben", 2), ("eve", 3)):
        cache.keep(scope, kept([token] * 5))
    assert cache.bytes == size(5) * 3
    assert found(cache, [1] * 9, "ana") == 5  # ana's chat is used: ben's is now the oldest
    cache.keep("sam", kept([4] * 5))
    assert cache.bytes == size(5) * 3
    assert found(cache, [2] * 9, "ben") == 0
    assert [found(cache, [t] * 9, s) for s, t in (("ana", 1), ("eve", 3), ("sam", 4))] == [5] * 3


def test_room_is_made_for_a_large_chat_by_dropping_as_many_as_it_takes() -> None:
    cache = PrefixCache(size(10) * 3)
    for token in range(3):
        cache.keep(f"caller {token}", kept([token] * 10))
    cache.keep("large", kept([9] * 20))
    assert (len(cache), cache.bytes) == (2, size(10) + size(20))
    assert found(cache, [2] * 20, "caller 2") == 10


def test_a_chat_larger_than_the_bound_is_not_kept_and_drops_nobody() -> None:
    cache = cached([1] * 5, most_bytes=size(8))
    cache.keep("ben", kept([2] * 9))
    assert (len(cache), cache.bytes) == (1, size(5))
    cache.keep("ben", kept([2] * 8))
    assert (len(cache), cache.bytes) == (1, size(8)), "one that just fits is kept"
    assert PrefixCache(0).keep("ana", kept([1])) is None
    assert found(cached([1] * 9, most_bytes=0), [1] * 20) == 0


def test_one_caller_s_many_chats_are_bounded_in_number_and_the_oldest_goes() -> None:
    chats = [[token] * 5 for token in range(_MOST_OF_A_SCOPE + 2)]
    cache = cached(*chats)
    assert len(cache) == _MOST_OF_A_SCOPE
    assert cache.bytes == size(5) * _MOST_OF_A_SCOPE
    assert [found(cache, [*ids, 77, 77]) for ids in chats] == [0, 0] + [5] * _MOST_OF_A_SCOPE


def test_of_one_caller_s_many_chats_the_one_in_use_stays() -> None:
    cache = cached(*([token] * 5 for token in range(_MOST_OF_A_SCOPE)))
    assert found(cache, [0] * 9) == 5
    cache.keep("ana", kept([50] * 5))
    assert found(cache, [0] * 9) == 5, "it was used last: another one is older"
    assert found(cache, [1] * 9) == 0


# -- whatever happens ------------------------------------------------------------------------------

SCOPES = ("ana", "ben", "eve")
ids_strategy = st.lists(st.integers(0, 1), min_size=1, max_size=9)
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.integers(0, 2), ids_strategy),
        st.tuples(st.just("find"), st.integers(0, 2), ids_strategy),
        st.tuples(st.just("share"), st.just(0), ids_strategy),
    ),
    max_size=40,
)


@given(happenings, st.integers(0, 40))
def test_a_hit_is_always_of_the_caller_s_own_or_of_the_shared_prefix(
    events: list[tuple[str, int, list[int]]], most_tokens: int
) -> None:
    cache = PrefixCache(size(most_tokens) if most_tokens else 0)
    for what, owner, ids in events:
        if what == "share":
            cache.share(kept(ids, owner=-1))
        elif what == "keep":
            start = cache.starts_shared(ids)
            cache.keep(SCOPES[owner], kept(ids, start, owner))
        else:
            _check(cache, owner, ids)
        entries = [one for _, one in cache._kept.values()]
        assert cache.bytes == sum(one.bytes for one in entries) <= cache._most_bytes
        assert len(cache) == len(entries) == sum(map(len, cache._scopes.values()))
        assert all(0 < len(chats) <= _MOST_OF_A_SCOPE for chats in cache._scopes.values())


def _check(cache: PrefixCache, owner: int, prompt: list[int]) -> None:
    """What is found belongs to ``owner``, is what the prompt says, and none is longer."""
    shared = cache.shared
    begun = cache.starts_shared(prompt)
    mine = [one for scope, one in cache._kept.values() if scope == SCOPES[owner]]
    hit = cache.find(SCOPES[owner], prompt)
    assert 0 <= hit.tokens <= max(0, len(prompt) - 2)
    if hit.kept is None:
        assert hit.tokens in (0, begun)
        assert not hit.tokens or (shared is not None and hit.tokens == len(shared.ids))
        behind: list[int] = []
    else:
        assert any(hit.kept is one for one in mine)
        part = hit.tokens - hit.kept.start
        behind, owners = (each[:part].tolist() for each in hit.kept.saved)
        assert part > 0 and set(owners) == {owner}
    before = [] if shared is None else shared.ids.tolist()
    start = hit.kept.start if hit.kept is not None else hit.tokens
    assert before[:start] + behind == prompt[: hit.tokens]
    for one in mine:
        common = next(
            (i for i, (a, b) in enumerate(zip(one.ids, prompt, strict=False)) if a != b),
            min(len(one.ids), len(prompt)),
        )
        reachable = min(common, len(prompt) - 2)
        assert hit.tokens >= reachable or reachable <= one.start
