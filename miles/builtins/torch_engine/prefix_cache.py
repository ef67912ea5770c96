"""Prefixes that were computed before, as a tree: each node is a stretch of tokens with their keys and values.

A path from the root spells a prefix. A request walks down as far as its tokens agree, copies what it passed, and
prefills only the rest; the samples of a group, the turns of a conversation and the branches of an agent meet here.
When the budget is exceeded the leaf that was unused the longest goes. Everything belongs to one version of the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from miles.builtins.torch_engine.kv_cache import Segment


@dataclass(eq=False)
class Node:
    tokens: list[int]
    segment: Segment
    parent: Node | None
    hidden: Tensor | None = None
    """The model's output at the last token, `[H]`: with it, a request for exactly this prefix needs no forward."""
    children: dict[int, Node] = field(default_factory=dict)
    """By first token."""


@dataclass(frozen=True)
class Match:
    """How much of a request is there: the first `tokens` of it, spelled by `path` (node, tokens used of it)."""

    tokens: int = 0
    path: tuple[tuple[Node, int], ...] = ()
    hidden: Tensor | None = None
    """Given when all of the request is there and no forward is needed."""


class PrefixCache:
    def __init__(self, budget: int):
        """`budget` in tokens; 0 keeps nothing."""
        self.budget = budget
        self.tokens = 0
        self._roots: dict[int, Node] = {}
        # Oldest first. A path is always touched leaf first, so a parent is never older than its children and the
        # oldest node is a leaf.
        self._by_age: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_age)

    def clear(self) -> None:
        for node in self._by_age:  # nodes know each other in a circle, which alone would keep their memory for a while
            node.parent = None
            node.children.clear()
        self._roots, self._by_age, self.tokens = {}, OrderedDict(), 0

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest prefix that is there, leaving at least one token to compute unless nothing needs computing."""
        path, position = self._walk(tokens)
        if not path:
            return Match()
        self._touch(path[-1][0])
        last, used = path[-1]
        if position < len(tokens):
            return Match(position, tuple(path))
        if used == len(last.tokens) and last.hidden is not None:
            return Match(position, tuple(path), last.hidden)
        path[-1] = (last, used - 1)
        return Match(position - 1, tuple(step for step in path if step[1]))

    def insert(self, tokens: Sequence[int], read: Callable[[int, int], Segment], hidden: Tensor | None = None) -> None:
        """Remember a prefix; `read(start, end)` copies out the part of it that is not there yet."""
        if len(tokens) > self.budget:
            return
        path, position = self._walk(tokens)
        parent = None
        if path:
            parent, used = path[-1]
            if used < len(parent.tokens):
                parent = self._split(parent, used)
        if position < len(tokens):
            node = Node(list(tokens[position:]), read(position, len(tokens)), parent)
            self._children(parent)[node.tokens[0]] = node
            self._add(node)
            parent = node
        if parent is None:
            return
        if hidden is not None:
            parent.hidden = hidden
        self._touch(parent)
        while self.tokens > self.budget:
            self._evict()

    def _walk(self, tokens: Sequence[int]) -> tuple[list[tuple[Node, int]], int]:
        path: list[tuple[Node, int]] = []
        position, children = 0, self._roots
        while position < len(tokens) and (node := children.get(tokens[position])) is not None:
            used = common_prefix(node.tokens, tokens[position : position + len(node.tokens)])
            path.append((node, used))
            position += used
            if used < len(node.tokens):
                break
            children = node.children
        return path, position

    def _children(self, node: Node | None) -> dict[int, Node]:
        return self._roots if node is None else node.children

    def _add(self, node: Node) -> None:
        self._by_age[node] = None
        self.tokens += len(node.tokens)

    def _touch(self, node: Node | None) -> None:
        while node is not None:
            self._by_age.move_to_end(node)
            node = node.parent

    def _split(self, node: Node, at: int) -> Node:
        """Divide a node in two; returns the upper one, which takes its place."""
        upper = Node(node.tokens[:at], node.segment.cut(0, at), node.parent)
        self._children(node.parent)[upper.tokens[0]] = upper
        upper.children[node.tokens[at]] = node
        node.segment = node.segment.cut(at, len(node.tokens))
        node.tokens, node.parent = node.tokens[at:], upper
        self._by_age[upper] = None
        self._touch(upper)
        return upper

    def _evict(self) -> None:
        node, _ = self._by_age.popitem(last=False)
        self.tokens -= len(node.tokens)
        del self._children(node.parent)[node.tokens[0]]


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items two sequences share."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
