"""What copying, typing in haste and scanning do to a page: the noise of the identity tagger's training text."""

from __future__ import annotations

import random
import re

from ci.data.identity_pieces import Pieces

# Look-alikes of a scanner.
_ALIKE = {
    "o": "0", "l": "1", "i": "l", "e": "c", "n": "m", "s": "5", "0": "O", "1": "l", "5": "S", "8": "B", "m": "rn",
    "a": "o",
    "u": "v", "É": "E", "é": "e", "è": "e", "B": "8", "S": "5", "I": "1", "6": "b", "g": "9", "t": "f",
}  # fmt: skip


def worn(pieces: Pieces, choose: random.Random) -> Pieces:
    """What copying, typing in haste and scanning do to a page."""
    if choose.random() < 0.12:
        pieces = [(re.sub(r"\n+", " ", text), label) for text, label in pieces]
    if choose.random() < 0.12:
        pieces = [(re.sub(r"\b(?:Dr|Pr|Mme|M|Mr|Docteur|Professeur|Madame|Monsieur)\b\.? ?",
        "", text) if not label else text,
                   label) for text, label in pieces]  # fmt: skip
    if choose.random() < 0.1:
        pieces = [(text.replace(":", "") if not label else text, label) for text, label in pieces]
    if choose.random() < 0.25:
        pieces = [(text if label else re.sub(r"\w+ ?",
        lambda m: "" if choose.random() < 0.15 else m.group(), text), label)
                  for text, label in pieces]  # fmt: skip
    drawn = choose.random()
    if drawn < 0.06:
        pieces = [(text.lower(), label) for text, label in pieces]
    elif drawn < 0.12:
        pieces = [(text.upper(), label) for text, label in pieces]
    elif drawn < 0.18:
        pieces = [(text.lower() if label in ("NOM", "PRENOM", "VILLE") else text, label) for text, label in pieces]
    if choose.random() < 0.3:
        rate = choose.choice((0.02, 0.05, 0.1))
        pieces = [(noisy(text, choose, rate if label else rate / 4), label) for text, label in pieces]
    return pieces


def noisy(text: str, choose: random.Random, rate: float) -> str:
    """`text` with letters and digits misread at `rate`."""
    made: list[str] = []
    for character in text:
        if choose.random() < rate and character.isalnum():
            drawn = choose.random()
            if drawn < 0.2 and made and made[-1].isalnum():
                character, made[-1] = made[-1], character
            elif drawn < 0.3:
                character = ""
            else:
                character = _ALIKE.get(character, character)
        made.append(character)
    return "".join(made)
