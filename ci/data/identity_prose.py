"""Published French case reports that the identity tagger learns prose from: E3C, layer 3 (CC BY)."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from functools import cache

from ci.bench.reports_data import folder
from ci.data.identity_pieces import rules
from shards.reports.identity.gazetteers import MEDICAL

_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE = re.compile(r"[^.!?\n]{15,220}[.!?]")


@cache
def prose(training: bool) -> tuple[str, ...]:
    """E3C layer 3 texts (Pan African Medical Journal, CC BY): the half for training, or the other one."""
    packed = (folder("fr_clinical_cases") / "e3c_pamj_layer3.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    chosen = [row["text"] for row in rows if hashlib.sha256(row["id"].encode()).digest()[0] % 2 == 0]
    seen = frozenset(chosen)  # some texts stand there twice, under two ids
    return tuple(chosen) if training else tuple(row["text"] for row in rows if row["text"] not in seen)


@cache
def sentences() -> tuple[str, ...]:
    """Sentences of the training half in which rules find nothing."""
    detector = rules()
    found = [match.group().strip() for text in prose(True) for match in _SENTENCE.finditer(text)]
    return tuple(one for one in found[::3] if not detector.find(one, "fr"))


@cache
def words_of_prose() -> tuple[str, ...]:
    """Words of the training half, and the names and words of medicine that are kept."""
    seen = Counter(word for text in prose(True) for word in _WORD.findall(text) if len(word) > 2)
    return tuple(sorted(word for word, count in seen.items() if count > 1)) + tuple(sorted(MEDICAL))
