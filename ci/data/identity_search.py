"""Every byte of a packed set, searched for identifiers that were put into its source.

Long numbers, names in full and mail addresses must not stand anywhere; single names and dates must not stand in the
study that they were put into. A surrogate may by chance be a name or a date of the same report, so that what is found
of these counts only where it is found again in a set of another key, which has other surrogates.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ci.data.hospital_export import Injected, StudyTruth
from shards.reports.identity.gazetteers import plain

_WORD = re.compile(r"[^\W\d_]+")
_TOKEN = re.compile(r"\w+(?:[./-]\w+)*")
_NUMBER = re.compile(r"\d(?:[ ./\-]?\d){5,}")
_LETTERS = re.compile(rb"[\x20-\x7e\xc3\x80-\xbf]{6,}")
_PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND"}
_DIGITS_MIN = 9  # of a number that chance does not write: eight are those of a date


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Key -> record of all samples of a set."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    found[member.name.partition(".")[0]] = json.load(content)
    return found


def everywhere(folder: Path, logs: str, studies: Iterable[StudyTruth]) -> Counter[str]:
    """Kind -> how many texts of the set or its logs hold a long number, mail address or place of any study."""
    numbers: dict[str, str] = {}
    others: dict[str, str] = {}
    for study in studies:
        numbers[re.sub(r"\D", "", study.uid)] = "id"
        for one in study.injected:
            digits = re.sub(r"\D", "", one.text)
            if one.kind in ("id", "phone") and len(digits) >= _DIGITS_MIN:
                numbers[digits] = one.kind
            elif one.kind == "mail":
                others[one.text.lower()] = one.kind
    found: Counter[str] = Counter()
    for text in (*_texts(folder), logs):
        for match in _NUMBER.finditer(text):
            if kind := numbers.get(re.sub(r"\D", "", match[0])):
                found[kind] += 1
        lowered = text.lower()
        for word in re.findall(r"[\w.+-]+@[\w.-]+\w", lowered):
            found.update([others[word]] if word in others else [])
    return found


def beside_samples(folder: Path, logs: str, studies: Iterable[StudyTruth]) -> Counter[str]:
    """Kind -> names, dates and places of any study in side files, manifest, audit, list of refusals and logs."""
    texts = [text for path, text in _side_texts(folder) if path.suffix != ".tar"]
    tokens = {token for text in (*texts, logs) for token in _TOKEN.findall(text)}
    put_in = {one for study in studies for one in study.injected if one.kind in ("name", "date", "place")}
    return Counter(
        one.kind for one in put_in if len(one.text) > 3 and all(part in tokens for part in _TOKEN.findall(one.text))
    )


def in_own_study(record: Mapping[str, Any], study: StudyTruth) -> set[Injected]:
    """What was put into a study's report and stands in its record, more often than in its prose."""
    text = plain(json.dumps(_said(record), ensure_ascii=False))
    prose = plain(study.prose)
    words, of_prose = (Counter(_WORD.findall(one)) for one in (text, prose))
    compact = re.sub(r"[\s./\-]", "", text)
    found = set()
    for one in study.injected:
        written = plain(one.text)
        if one.kind == "name":  # of several words each, but for particles
            parts = [part for part in _WORD.findall(written) if len(part) > 2]
            hit = any(words[part] > 0 and not of_prose[part] for part in parts)
        elif one.kind == "date":
            hit = re.search(rf"(?<!\d){re.escape(written)}(?!\d)", text) is not None
        elif one.kind in ("id", "phone"):
            digits = re.sub(r"[\s./\-]", "", written)
            hit = len(digits) > 5 and re.search(rf"(?<![0-9a-z]){re.escape(digits)}(?![0-9a-z])", compact) is not None
        else:
            hit = written in text
        if hit:
            found.add(one)
    return found


def _said(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what a table of diseases, the same for all studies, says in its structured report."""
    structured = record.get("structured_report") or {}
    items = [
        {name: value for name, value in item.items() if name not in ("definition", "appearance")}
        for item in structured.get("items", ())
    ]
    return {**record, "structured_report": {**structured, "items": items}}


def _texts(folder: Path) -> Iterator[str]:
    """All that can be read in a set: members of tars, also letters among pixels, and files beside them."""
    for path, text in _side_texts(folder):
        if path.suffix != ".tar":
            yield text
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                data = content.read()
                yield json.dumps({**member.get_info(), "pax": member.pax_headers}, default=str)
                if member.name.endswith(".json"):
                    yield data.decode()
                else:
                    yield " ".join(_letters_of_png(data))


def _letters_of_png(data: bytes) -> Iterator[str]:
    """What could be text in a PNG; chunks that may hold text are an error."""
    at = 8
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind not in _PNG_CHUNKS:
            yield f"chunk {kind!r}"
        at += 12 + length
    for match in _LETTERS.finditer(data):
        yield match[0].decode("utf-8", "ignore")


def _side_texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            yield path, json.dumps(pq.read_table(io.BytesIO(path.read_bytes())).to_pydict(), default=str)
        elif path.is_file() and path.suffix != ".tar":
            yield path, path.read_text("utf-8")
