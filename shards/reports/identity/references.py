"""Numbers that the public holds in common and that point at nobody: laws, trials, genes, codes, teeth, versions.

They look like identifiers ("NCT03515837", "articles 313-1 à 313-3", "dents 18 28 38 48"), so they are hidden from the
rules of numbers and from the learned layer before these look.
"""

from __future__ import annotations

import re

from shards.reports.identity.view import View

_MONTHS = "janvier|fevrier|mars|avril|mai|juin|juillet|aout|septembre|octobre|novembre|decembre"
_DATED = rf" du (?:\d{{1,2}}(?:er)? (?:{_MONTHS}) \d{{4}}|\d{{1,2}}/\d{{1,2}}/\d{{4}})"
_ARTICLE = r"(?:[lrda]\. ?\*?)?\d{1,4}(?:-\d{1,3}){0,4}(?![\w/]|[.,]\d)"
# A law of this number or of this day: "loi n° 2011-814 du 7 juillet 2011"; prescriptions, and what was stopped on a
# day, share their words with orders of the state ("ordonnance du 3 mai", "arrêté du 6 au 9 avril"), so these need one.
_LAW = re.compile(
    rf"(?<!\w)(?:loi|decret)s?(?: [a-z]+(?: et [a-z]+)?)??"
    rf"(?: ?(?:n[°o] ?)?\d\d(?:\d\d)?-\d{{1,4}}(?:{_DATED})?|{_DATED})"
    rf"|(?<!\w)(?:arrete|ordonnance|circulaire|instruction|directive|reglement)s?(?: \(?[a-z/\d]+\)?)??"
    rf" ?(?:n[°o] ?)?(?:19|20)?\d\d[\-/]\d{{2,4}}(?!\w|[\-/.,]\d)(?:{_DATED})?"
    rf"|(?<!\w)arrete{_DATED} (?=relati|portant|fixant|modifi|dit|pris)"
)
_ARTICLES = re.compile(
    rf"(?<!\w)(?:articles?|art\.) ?{_ARTICLE}(?:(?:,| a| et| ou)+ {_ARTICLE})*"
    r"|(?<!\w)[lrd]\. ?\*?\d{1,4}-\d{1,3}(?:-\d{1,3}){0,3}(?![\w/])"
)
_REGISTERED = re.compile(
    r"(?<!\w)(?:nct ?\d{8}|isrctn ?\d{8}|pmid ?:? ?\d{6,8}|doi ?:? ?10\.\d{4,9}/\S+|orpha ?:? ?\d{2,6}"
    r"|(?:omim|mim) ?[:#*]? ?\d{6}|eudract[ :n°]{0,5}\d{4}-\d{6}-\d\d(?:-\d\d)?"
    r"|(?:(?:id-?)?rcb[ :n°]{0,5})?\d{4}-a\d{5}-\d\d|cofrac[ :n°o]{0,5}\d-\d{3,4}"
    r"|cerfa[ :n°o]{0,5}\d{5}(?:\*\d\d)?)(?!\w)"
)
_GENE = r"(?=[a-z]{1,6}\d)[a-z]{2,6}\d{1,3}(?:[a-z]{1,2}\d?)?"
_GENETIC = re.compile(
    r"(?<!\w)(?:[cgmnpr]\.\(?[a-z\d*][\w>*+\-=?()]*|(?:nm|np|nr|nc|ng|lrg|ens[gtp])_?\d{2,}(?:\.\d+)?|rs\d{3,}"
    r"|(?:hla[ \-]?)?(?:a|b|c|d[pqr][ab]?\d?)\*\d{2,3}(?::\d{2,3})*|chr(?:\d\d?|x|y):[\d\-]+"
    r"|4[4-8],x[xy]?(?:,[^\s;]+)?|\d{1,2}[pq]\d\d?(?:\.\d+)?(?:[pq]\d\d?(?:\.\d+)?)?)"
)
_GENES = re.compile(rf"(?<![\w\-]){_GENE}(?:(?:, ?| ?/ ?| et | ou |; ?){_GENE}(?![\w\-])){{2,}}")
_CODED = re.compile(
    r"(?<!\w)(?:(?:codes? )?(?:adicap|snomed(?: ct)?|cim-?o?-?\d{0,2}|icd-?o?-?\d{0,2}|ccam|ngap|loinc|atc|ghm)"
    r"|nomenclature(?: inami)?)[ :n°]{1,4}(?:[a-z]{0,7}-?\d[\w./\-]*(?:, ?(?=[\w\-]*\d))?)+"
)
_EDITION = re.compile(
    r"(?<!\w)(?:oms|who|eln|has|esc|eular|acr|kdigo|figo|uicc|ajcc|tnm|gina|gold|ansm|cheson|lugano|recist|fleischner"
    r"|tokyo|baveno|asas|caspar|mcdonald|bethesda|ue)[ \-](?:19|20)\d\d(?:/\d{1,4})?(?!\w|[/.\-]\d)"
)
_APGAR = re.compile(r"(?<!\w)apgar[ :=a]{1,4}\d{1,2}(?:[/\-]\d{1,2}){1,3}(?!\d)")
# By their quadrant and place, of a child's mouth 5 to 8; only in a line that speaks of teeth.
_TOOTH = r"(?:[1-4][1-8]|[5-8][1-5])"
_TEETH = re.compile(rf"(?<![\w.,/\-])(?<!\d ){_TOOTH}(?:(?:, ?| et | ?- ?| ){_TOOTH}(?!\w))+(?! ?\d|[/.]\d)")
_OF_TEETH = re.compile(r"(?<!\w)(?:dents?|dentaires?|denture|bridge|couronnes?|molaires?|edent\w+|caries?)(?!\w)")
# The year of a publication: "et al., Methods Inf Med. 2024", "et al. (2019)"; in the capitals of the text.
_PUBLISHED = re.compile(
    r"(?<!\w)et al\b[.,:; ]{0,3}(?:(?:[A-Z][\w\-]*|of|the|and|in|&)[., ]{1,2}){0,6}"
    r"\(?(?P<year>(?:19|20)\d\d)(?![\w/\-])"
)
_BY_WORDS = (
    (_LAW, ("loi", "decret", "arrete", "ordonnance", "circulaire", "instruction", "directive", "reglement")),
    (_ARTICLES, ("article", "art.", "l.", "r.", "d.")),
    (_REGISTERED, ("nct", "isrctn", "pmid", "doi", "orpha", "mim", "eudract", "-a", "cofrac", "cerfa")),
    (_CODED, ("adicap", "snomed", "cim", "icd", "ccam", "ngap", "loinc", "atc", "ghm", "nomenclature")),
    (_APGAR, ("apgar",)),
)


def find(view: View) -> list[tuple[int, int]]:
    """Bounds of the references, in no order; they may overlap."""
    if not view.numbers:
        return []
    text = view.masked
    found = [
        match.span()
        for pattern, words in _BY_WORDS
        if any(word in text for word in words)
        for match in pattern.finditer(text)
    ]
    if "et al" in text:
        found += [match.span("year") for match in _PUBLISHED.finditer(view.text)]
    for pattern, before in ((_GENETIC, 8), (_GENES, 8), (_EDITION, 12)):
        found += [match.span() for match in view.at_numbers(pattern, before)]
    if "dent" in text or _OF_TEETH.search(text):
        found += [
            (start + match.start(), start + match.end())
            for start, line in _lines(text)
            if _OF_TEETH.search(line)
            for match in _TEETH.finditer(line)
        ]
    return found


def _lines(text: str) -> list[tuple[int, str]]:
    """Each line with where it begins."""
    lines, start = [], 0
    for line in text.split("\n"):
        lines.append((start, line))
        start += len(line) + 1
    return lines
