"""The tree of prefixes, against a plain list of everything that was ever inserted."""

from __future__ import annotations

import gc
import random
import weakref

import torch

from miles.builtins.torch_engine.kv_cache import Segment
from miles.builtins.torch_engine.prefix_cache import PrefixCache, common_prefix


def reader(tokens):
    """Segments whose keys spell the tokens, so that a path can be checked."""

    def read(start, end):
        return Segment(torch.tensor(tokens[start:end], dtype=torch.float32).view(1, 1, 1, -1, 1), None)

    return read


def spelled(match):
    parts = [node.segment.kv[..., :used, :].flatten().int().tolist() for node, used in match.path]
    return [token for part in parts for token in part]


def insert(cache, tokens, hidden=None):
    cache.insert(tokens, reader(tokens), hidden)


def test_a_request_finds_what_it_shares_with_earlier_ones():
    cache = PrefixCache(100)
    insert(cache, [1, 2, 3, 4])
    insert(cache, [1, 2, 5])
    insert(cache, [7])
    for tokens, shared in [([1, 2, 3, 9], 3), ([1, 2, 5, 6, 7], 3), ([1, 9], 1), ([8], 0), ([7, 7], 1)]:
        match = cache.match(tokens)
        assert match.tokens == shared
        assert spelled(match) == tokens[:shared]
    assert cache.tokens == 6  # [1 2] [3 4] [5] [7]


def test_a_whole_prompt_needs_no_forward_only_if_its_output_was_kept():
    cache = PrefixCache(100)
    hidden = torch.ones(3)
    insert(cache, [1, 2, 3, 4], hidden)
    assert cache.match([1, 2, 3, 4]).hidden is hidden
    assert cache.match([1, 2, 3, 4]).tokens == 4
    short = cache.match([1, 2, 3])
    assert (short.tokens, short.hidden, spelled(short)) == (2, None, [1, 2])
    insert(cache, [1, 2, 9])  # splits the node
    assert cache.match([1, 2, 3, 4]).hidden is hidden
    assert spelled(cache.match([1, 2, 3, 4])) == [1, 2, 3, 4]
    insert(cache, [1, 2], torch.zeros(3))
    assert cache.match([1, 2]).tokens == 2
    assert PrefixCache(9).match([1]).path == ()


def test_a_prompt_of_one_token_leaves_nothing_to_match():
    cache = PrefixCache(100)
    insert(cache, [1])
    assert cache.match([1]).tokens == 0
    assert cache.match([1]).path == ()


def test_the_least_recently_used_leaf_goes_first():
    cache = PrefixCache(6)
    insert(cache, [1, 2])
    insert(cache, [3, 4])
    insert(cache, [5, 6])
    cache.match([1, 2, 0])
    insert(cache, [7])
    assert [cache.match([t, t + 1, 0]).tokens for t in (1, 3, 5)] == [2, 0, 2]
    assert cache.tokens == 5


def test_a_parent_outlives_its_children():
    cache = PrefixCache(4)
    insert(cache, [1, 2])
    insert(cache, [1, 2, 3, 4])
    insert(cache, [5, 6])
    assert cache.match([1, 2, 3, 4, 9]).tokens == 2


def test_what_exceeds_the_budget_alone_is_not_kept():
    cache = PrefixCache(3)
    insert(cache, [1, 2, 3, 4])
    assert (len(cache), cache.tokens) == (0, 0)
    nothing = PrefixCache(0)
    insert(nothing, [1])
    assert len(nothing) == 0


def test_clear_forgets_everything():
    cache = PrefixCache(10)
    insert(cache, [1, 2, 3])
    cache.clear()
    assert (cache.match([1, 2, 3]).tokens, cache.tokens, len(cache)) == (0, 0, 0)


def test_random_sequences_agree_with_a_list():
    generator = random.Random(0)
    cache, seen = PrefixCache(10**6), []
    for _ in range(400):
        tokens = [generator.randrange(3) for _ in range(generator.randrange(1, 12))]
        best = max((common_prefix(tokens, other) for other in seen), default=0)
        match = cache.match(tokens)
        assert match.tokens == min(best, len(tokens) - 1)
        assert spelled(match) == tokens[: match.tokens]
        insert(cache, tokens)
        seen.append(tokens)
    distinct = {tuple(tokens[:end]) for tokens in seen for end in range(1, len(tokens) + 1)}
    assert cache.tokens == len(distinct)


def test_random_sequences_within_a_budget_spell_themselves():
    generator = random.Random(1)
    cache = PrefixCache(40)
    for _ in range(600):
        tokens = [generator.randrange(3) for _ in range(generator.randrange(1, 15))]
        match = cache.match(tokens)
        assert spelled(match) == tokens[: match.tokens]
        insert(cache, tokens)
        assert cache.tokens <= 40


def test_clear_gives_memory_back_at_once():
    cache = PrefixCache(100)
    for tokens in ([1, 2, 3, 4], [1, 2, 5], [7]):
        insert(cache, tokens)
    segments = [weakref.ref(node.segment) for node in cache._by_age]
    gc.disable()
    try:
        cache.clear()
        assert [segment() for segment in segments] == [None] * 4
    finally:
        gc.enable()
