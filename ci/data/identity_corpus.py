"""Training text of the identity tagger: French blocks, reports and letters with identifiers that are drawn anew.

Sources: the even blocks of fr_deid_templates (the odd ones are held out for the benchmark and never read here), letters
with slots in identity_letters.txt and every other report of identity_reports.txt (both ours), and sentences of E3C.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ci.bench.reports_deid import Document, tagged
from ci.data.identity_noise import worn
from ci.data.identity_person import Person
from ci.data.identity_pieces import Pieces, document_of
from ci.data.identity_prose import sentences

_LETTERS = Path(__file__).with_name("identity_letters.txt")
_APART = Path(__file__).with_name("identity_apart.txt")
_REPORTS = Path(__file__).with_name("identity_reports.txt")
_SLOT = re.compile(r"\{(\w+)\}")


def letters() -> list[str]:
    """Letters and headers with slots."""
    return _blocks(_LETTERS)


def reports(training: bool) -> list[Document]:
    """Tagged reports of our own: the even ones, which rules and weights may learn from, or the odd ones."""
    return [tagged(block) for block in _blocks(_REPORTS)[0 if training else 1 :: 2]]


def apart_letters() -> list[Document]:
    """Tagged letters of our own that nothing is trained on; thresholds were chosen with a view to them."""
    return [tagged(block) for block in _blocks(_APART)]


def _blocks(path: Path) -> list[str]:
    return [block for block in path.read_text("utf-8").split("\n\n") if block.strip()]


def made_up(choose: random.Random, blocks: Sequence[Pieces], number: int) -> Iterator[Document]:
    """`number` documents with drawn identifiers: half of them blocks, half letters."""
    forms = letters()
    for index in range(number):
        person = Person(choose)
        if index % 2 and blocks:
            pieces = [(person.like(text, label), label) for text, label in blocks[index // 2 % len(blocks)]]
            if choose.random() < 0.3:
                pieces = _window(pieces, choose)
        else:
            joined: Pieces = []
            for _ in range(choose.choice((1, 1, 1, 2, 3))):
                joined += [
                    *_filled(choose.choice(forms), person, choose),
                    (choose.choice(("\n", "\n", " ", "\n\n")), ""),
                ]
            pieces = joined[:-1]
        yield document_of(worn(pieces, choose))


def _filled(form: str, person: Person, choose: random.Random) -> Pieces:
    pieces: Pieces = []
    for place, part in enumerate(_SLOT.split(form)):
        pieces += [(part, "")] if place % 2 == 0 else person.slot(part)
    if choose.random() < 0.15:
        pieces.append((" " + choose.choice(sentences()), ""))
    return pieces


def _window(pieces: Pieces, choose: random.Random) -> Pieces:
    first = choose.randrange(len(pieces))
    return pieces[first : first + choose.randrange(2, 12)]
