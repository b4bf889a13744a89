"""Whether a name stands for a disease, a sign or a device, and so for nobody: "maladie de Paget", "Carpentier ring"."""

from __future__ import annotations

from shards.reports.identity.gazetteers import Word
from shards.reports.identity.view import LOWER, TITLE_CASE, View


def eponym(view: View, index: int) -> bool:
    """Whether the word stands in a disease, sign or device: "maladie de X", "X ring", "X's disease"."""
    flags, words = view.flags, view.words
    if (index and view.gap(index - 1).strip() == "") or (index and view.gap(index - 1) in ("'", "’", "-")):
        before = index - 1
        steps = 0
        while (
            before >= 0
            and steps < 4
            and (
                words[before]
                in ("de", "du", "d", "des", "of", "type", "selon", "en", "la", "l", "et", "and", "par", "pour")
                or (
                    view.gap(before) in ("-", " ") and view.shapes[before] == TITLE_CASE and flags[before] & Word.EPONYM
                )
            )
        ):
            before, steps = before - 1, steps + 1
        if (
            before >= 0
            and flags[before] & Word.EPONYM_HEAD
            and view.ends[before] + 24 > view.starts[index]
            and "\n" not in view.text[view.ends[before] : view.starts[index]]
            and "." not in view.text[view.ends[before] : view.starts[index]]
        ):
            return True
    after = index + 1
    if after < len(words) and words[after] == "s" and view.gap(index) in ("'", "’"):
        after += 1
    steps = 0
    while (
        after < len(words)
        and steps < 2
        and view.shapes[after] != LOWER
        and view.gap(after - 1) in (" ", "-", "–")
        and not flags[after] & Word.EPONYM_HEAD
    ):
        after, steps = after + 1, steps + 1
    return (
        after < len(words)
        and bool(flags[after] & Word.EPONYM_HEAD)
        and view.gap(after - 1) in (" ", "-")
        and view.shapes[after] == LOWER
        and words[after] not in ("main", "pied", "type", "voie", "point")
    )
