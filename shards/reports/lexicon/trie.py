"""The longest phrases of a word list in a text, by a trie of words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

END = ""  # key under which a trie that is being built holds the entry of a phrase; no word is empty


class Node(NamedTuple):
    """Where a phrase has got to: its entry if it may end here, and the words it may go on with."""

    entry: Any | None
    following: Mapping[str, Node] | None


def frozen(trie: Mapping[str, Any]) -> Node:
    """The node of a trie built as dicts, word -> dict, the entry of a phrase under END."""
    following = {word: frozen(child) for word, child in trie.items() if word != END}
    return Node(trie.get(END), following or None)


def search(words: Sequence[str], begins: Iterable[Node | None]) -> list[tuple[int, int, Any]]:
    """(first word, word after the last, entry) of the longest phrases from left to right, none within another.

    `begins`: for each word the node that phrases beginning with it start from.
    """
    found = []
    nodes = list(begins)
    closed = [*words, END]  # no phrase goes on with that
    free = 0
    for place, node in compress(enumerate(nodes), nodes):  # most words begin no phrase
        if node is None or place < free:
            continue
        entry, following = node
        free = ahead = place + 1
        while following and (node := following.get(closed[ahead])):
            further, following = node
            ahead += 1
            if further is not None:
                entry, free = further, ahead
        if entry is not None:
            found.append((place, free, entry))
    return found
