"""One report as it came, bytes or text, made into the document that every other part counts its spans in.

Characters are repaired (encoding, composition, invisible marks, markup, white space); no word is changed, added or
dropped, but for lines that every page of a PDF file repeats, and every repair is counted by kind. What is no text is
refused with the fault and none of its characters.
"""

from __future__ import annotations

import html
import io
import itertools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.errors import DataError

MAX_SIZE = 5_000_000  # bytes or characters; a long CT report has 10,000
MAX_CONTROL_SHARE = 0.05
MAX_HIGH_BYTE_SHARE = 0.5  # of bytes that are no UTF-8; French in cp1252 has 0.04, compressed data 0.5 and controls
MAX_MARKUP_ROUNDS = 4  # markup escaped this many times over is unescaped; deeper is left as it is

EDGE_LINES = 4  # of a page of a PDF file, at either end, that may be a heading of all pages

# How files begin that hold more than text; databases keep some in Base64.
FILE_SIGNATURES = (
    ("%PDF", "a PDF file"),
    ("JVBERi", "a PDF file in Base64"),
    ("{\\rtf", "an RTF file"),
    ("e1xydG", "an RTF file in Base64"),
    ("PK\x03\x04", "a zip or Office file"),
    ("\xd0\xcf\x11\xe0", "an old Office file"),
)

# By byte order mark; UTF-32 first, since its mark starts with that of UTF-16.
BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
# Windows, DOS and old Macintosh exports. They differ in where the accents are, so the accents tell which it was.
OLD_CHARSETS = ("cp1252", "cp850", "mac_roman")
# How much a letter speaks for its charset: small ones and é most.
LETTER_WEIGHTS = dict.fromkeys("ÀÂÄÇÈÉÊËÎÏÔÖÙÛÜŒâäëïöûüœß", 1) | dict.fromkeys("àèêçîôù", 2) | {"é": 4}

_UTF8_SEQUENCE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|([\x80-\xff])"
)
# UTF-8 read as cp1252 (or latin-1): the lead byte of an accented letter, a sign or a typographic mark with the bytes
# after it. Leads of other alphabets are left out: "É”" is a French quotation more often than a broken letter.
_BYTE_OF = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(0x80, 0x100)}
_BYTE_OF |= {chr(byte): byte for byte in range(0x80, 0xC0)}
_FOLLOWING = "".join(character for character, byte in _BYTE_OF.items() if byte < 0xC0)
_MOJIBAKE = re.compile(f"[ÂÃÅ][{_FOLLOWING}]|â[{_FOLLOWING}]{{2}}")

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f]")
_BROKEN = re.compile(r"[\ud800-\udfff\ufffe\uffff]")
_LINE_END = re.compile(r"\r\n?|[\v\f\x1c-\x1e\u2028\u2029]")
_SOFT_HYPHEN = re.compile(r"\u00ad\n?")
_ZERO_WIDTH = re.compile(r"[\u180e\u200b-\u200d\u2060\ufeff]")
_DIRECTION_MARK = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SPACE = re.compile(r"[\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
_DIGITS = re.compile(r"\d+")
_LIGATURE = re.compile("[ﬀ-ﬆ]")
_SYMBOL_BULLET = re.compile("[\uf0a7\uf0b7\uf0d8\uf0fc]")  # bullets of the Symbol and Wingdings fonts
# Unicode sorts a run of combining marks in quadratic time; no spelling stacks more than a few on a letter.
MAX_COMBINING = 8
_COMBINING = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code)))
_SURPLUS = re.compile(rf"(?<=[{_COMBINING}]{{{MAX_COMBINING}}})[{_COMBINING}]+")
_UNUSUAL = re.compile(r"[^\n\x20-\x7e\u00a1-\u00ac\u00ae-\u017f\u2010-\u2027\u2030-\u205e\u2070-\u2fff]")

# By what they leave between the words around them: a line end at either tag, at the opening one, a blank, nothing. Only
# names of HTML: "<5 mm" and "<patient>" stay.
_BLOCKS = frozenset(
    {
        "address", "article", "blockquote", "body", "caption", "center", "div", "dl", "h1", "h2", "h3", "h4", "h5",
        "h6", "head", "header", "footer", "html", "main", "ol", "p", "pre", "section", "table", "tbody", "tfoot",
        "thead", "title", "ul", "!doctype", "?xml",
    }
)  # fmt: skip
_LINES = frozenset({"br", "dd", "dt", "hr", "li", "tr"})
_CELLS = frozenset({"td", "th", "col", "colgroup"})
_INLINE = frozenset(
    {
        "a", "abbr", "acronym", "b", "big", "em", "font", "i", "img", "input", "label", "link", "mark", "meta", "o:p",
        "s", "small", "span", "strike", "strong", "sub", "sup", "tt", "u",
    }
)  # fmt: skip
_TAG = re.compile(r"</?([!?]?[A-Za-z][A-Za-z0-9:]{0,10})(?:\s[^<>]{0,2000})?/?>")
_HIDDEN = (
    (re.compile("<!--"), re.compile("-->")),
    (re.compile(r"<script\b[^<>]{0,500}>", re.I), re.compile(r"</script\s*>", re.I)),
    (re.compile(r"<style\b[^<>]{0,500}>", re.I), re.compile(r"</style\s*>", re.I)),
)
_ENTITY = re.compile(r"&(?:amp;)*(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """A document and how many repairs of each kind were made; kinds that were not needed are not named."""

    text: str
    repairs: Mapping[str, int]


def clean(raw: bytes | str) -> Cleaned:
    """The document of a report. White space is left as single blanks, line ends and one empty line between paragraphs.

    Raises DataError if `raw` is larger than MAX_SIZE or is no text.
    """
    if len(raw) > MAX_SIZE:
        unit = "bytes" if isinstance(raw, bytes) else "characters"
        raise DataError(f"report of {len(raw)} {unit} is larger than {MAX_SIZE}; split the file into its reports")
    repairs: Counter[str] = Counter()
    text = _as_text(raw, repairs)
    if "<" in text or "&" in text:
        text = _without_markup(text, repairs)
    if not text.isascii():
        text, count = _MOJIBAKE.subn(_once_decoded, text)
        _count(repairs, "mojibake", count)
    if _UNUSUAL.search(text):
        _refuse_binary(text)
        text = _repair_characters(text, repairs)
    if not unicodedata.is_normalized("NFC", text):
        composed = unicodedata.normalize("NFC", text)
        repairs["composed"] += max(1, len(text) - len(composed))
        text = composed
    return Cleaned(text=_tidy(text), repairs=dict(repairs))


def _as_text(raw: bytes | str, repairs: Counter[str]) -> str:
    """Text of a cell or file; of RTF and PDF files their text, where the extra is installed that reads them."""
    start = raw[:100].decode("latin-1") if isinstance(raw, bytes) else raw[:100]
    start = start.lstrip("\ufeff\xef\xbb\xbf \t\r\n\"'")
    for signature, kind in FILE_SIGNATURES:
        if start.startswith(signature):
            if kind == "an RTF file":
                return _text_of_rtf(raw, repairs)
            if kind == "a PDF file" and isinstance(raw, bytes):
                return _text_of_pdf(raw, repairs)
            raise DataError(f"report is {kind}; give its text")
    return _decode(raw, repairs) if isinstance(raw, bytes) else raw


def _text_of_rtf(raw: bytes | str, repairs: Counter[str]) -> str:
    try:
        from striprtf.striprtf import rtf_to_text
    except ImportError:
        raise DataError("report is an RTF file; pip install striprtf, which reads it, or give its text") from None
    try:
        text = rtf_to_text(raw.decode("cp1252", "replace") if isinstance(raw, bytes) else raw)
    except Exception as error:  # it raises many kinds, whose messages quote the file
        raise DataError(f"report is a broken RTF file ({type(error).__name__}); give its text") from None
    repairs["rtf"] += 1
    return text


def _text_of_pdf(raw: bytes, repairs: Counter[str]) -> str:
    """The text of all pages; a scan has none."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise DataError("report is a PDF file; pip install pypdf, which reads it, or give its text") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL + 1)  # its warnings quote the file
    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(raw)).pages]
    except Exception as error:  # it raises many kinds, whose messages quote the file
        raise DataError(f"report is a broken PDF file ({type(error).__name__}); give its text") from None
    text = _joined_pages(pages, repairs)
    if not any(map(str.isalnum, text)):
        raise DataError("report is a PDF file without text; give the text of what it shows")
    repairs["pdf"] += 1
    return text


def _joined_pages(pages: list[str], repairs: Counter[str]) -> str:
    """Pages behind each other: lines that all pages begin with stay on the first, those that all end with on the last.

    Numbers may differ in them, as those of pages do. A sentence that a page breaks off goes on.
    """
    lines = [[line.strip() for line in page.splitlines() if line.strip()] for page in pages]
    lines = [page for page in lines if page]
    if len(lines) > 1:
        heading = _alike(lines)
        footing = _alike([page[heading:][::-1] for page in lines])
        if heading or footing:
            repairs["pdf page heading"] += 1
        last = len(lines) - 1
        lines = [
            page[heading if number else 0 : len(page) - (0 if number == last else footing)]
            for number, page in enumerate(lines)
        ]
    text = ""
    for page in ("\n".join(page) for page in lines if page):
        text += ("\n\n" if text.endswith((".", "!", "?", ":")) else "\n" if text else "") + page
    return text


def _alike(pages: Sequence[Sequence[str]]) -> int:
    """How many lines all pages begin with alike, but for numbers, up to EDGE_LINES."""
    count = 0
    for together in itertools.islice(zip(*pages, strict=False), EDGE_LINES):
        if len({_DIGITS.sub("0", line) for line in together}) > 1:
            break
        count += 1
    return count


def wide_charset(start: bytes) -> str | None:
    """UTF-16 or UTF-32 by the byte order mark or the zeros in the first bytes of a file; None for all others."""
    for mark, charset in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return None if charset == "utf-8" else charset
    return _unmarked_utf16(start)


def _decode(raw: bytes, repairs: Counter[str]) -> str:
    for mark, charset in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            repairs["byte_order_mark"] += 1
            raw = raw[len(mark) :]
            if charset != "utf-8":
                repairs["charset"] += 1
                return raw.decode(charset, errors="replace")
            break
    if (unmarked := _unmarked_utf16(raw)) is not None:
        repairs["charset"] += 1
        return raw.decode(unmarked, errors="replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return _decode_old(raw, repairs)


def _unmarked_utf16(raw: bytes) -> str | None:
    """In Western text nearly every second byte of UTF-16 is zero, and no byte of the others."""
    half = len(raw) // 2
    if half == 0 or len(raw) % 2:
        return None
    zeros_even, zeros_odd = raw[::2].count(0), raw[1::2].count(0)
    if zeros_odd > 0.7 * half and zeros_even < 0.1 * half:
        return "utf-16-le"
    if zeros_even > 0.7 * half and zeros_odd < 0.1 * half:
        return "utf-16-be"
    return None


def _decode_old(raw: bytes, repairs: Counter[str]) -> str:
    """Bytes that are no UTF-8 in the old charset that makes most of them accented letters; valid UTF-8 beside them,
    as in files joined from two systems, is kept as such."""
    high = bytes(match[1][0] for match in _UTF8_SEQUENCE.finditer(raw) if match[1])
    if len(high) > MAX_HIGH_BYTE_SHARE * len(raw) and len(raw) > 8:
        raise DataError(f"report of {len(raw)} bytes is binary: {len(high)} of them belong to no text")
    charset = max(
        OLD_CHARSETS, key=lambda name: sum(LETTER_WEIGHTS.get(letter, 0) for letter in high.decode(name, "replace"))
    )
    repairs["charset"] += 1
    parts: list[str] = []
    start = 0
    for match in _UTF8_SEQUENCE.finditer(raw):
        if match[1]:
            parts.append(raw[start : match.start()].decode("utf-8", "replace") + match[1].decode(charset, "replace"))
            start = match.end()
    parts.append(raw[start:].decode("utf-8", "replace"))
    return "".join(parts)


def _refuse_binary(text: str) -> None:
    controls = sum(match[0] < "\x80" for match in _CONTROL.finditer(text)) + text.count("\ufffd")
    if controls > max(MAX_CONTROL_SHARE * len(text), 2):
        raise DataError(f"report of {len(text)} characters is binary: {controls} of them are control characters")


def _without_markup(text: str, repairs: Counter[str]) -> str:
    def left_by(tag: re.Match[str]) -> str:
        name = tag[1].lower()
        if name in _BLOCKS or name in _LINES:
            left = "\n" if name in _BLOCKS or not tag[0].startswith("</") else ""
        elif name in _CELLS or name in _INLINE:
            left = " " if name in _CELLS else ""
        else:
            return tag[0]
        repairs["html_tags"] += 1
        return left

    for opening, closing in _HIDDEN:
        text = _without_hidden(text, opening, closing, repairs)
    for _ in range(MAX_MARKUP_ROUNDS):  # escaped markup shows only after its entities are read
        text = _TAG.sub(left_by, text)
        text, entities = _ENTITY.subn(lambda match: html.unescape(f"&{match[1]};"), text)
        _count(repairs, "html_entities", entities)
        if not entities:
            break
    return text


def _without_hidden(text: str, opening: re.Pattern[str], closing: re.Pattern[str], repairs: Counter[str]) -> str:
    """Text without comments or scripts; one that never ends stays, since what follows it may be the report."""
    kept: list[str] = []
    start = 0
    while (first := opening.search(text, start)) and (last := closing.search(text, first.end())):
        kept.append(text[start : first.start()])
        start = last.end()
        repairs["html_tags"] += 1
    return " ".join([*kept, text[start:]])


def _repair_characters(text: str, repairs: Counter[str]) -> str:
    text, count = _LINE_END.subn("\n", text)
    _count(repairs, "line_ends", count)
    for kind, pattern, replacement in (
        ("soft_hyphens", _SOFT_HYPHEN, ""),
        ("zero_width", _ZERO_WIDTH, ""),
        ("direction_marks", _DIRECTION_MARK, ""),
        ("spaces", _SPACE, " "),
        ("bullets", _SYMBOL_BULLET, "•"),
        ("broken", _BROKEN, "\ufffd"),
        ("surplus_marks", _SURPLUS, ""),
    ):
        text, count = pattern.subn(replacement, text)
        _count(repairs, kind, count)
    text, count = _CONTROL.subn(_windows_character, text)
    _count(repairs, "controls", count)
    text, count = _LIGATURE.subn(lambda match: _LIGATURES[match[0]], text)
    _count(repairs, "ligatures", count)
    return text


def _once_decoded(match: re.Match[str]) -> str:
    return bytes(_BYTE_OF[character] for character in match[0]).decode("utf-8", "replace")


def _windows_character(match: re.Match[str]) -> str:
    """cp1252 read as latin-1 leaves its quotes and dashes as C1 controls; the other controls say nothing."""
    code = ord(match[0])
    return bytes([code]).decode("cp1252", "ignore") if code >= 0x80 else ""


def _count(repairs: Counter[str], kind: str, count: int) -> None:
    if count:
        repairs[kind] += count


def _tidy(text: str) -> str:
    """White space that carries no meaning; not counted as repair."""
    if "  " in text:
        text = re.sub("  +", " ", text)
    if " \n" in text or "\n " in text:
        text = re.sub(" ?\n ?", "\n", text)
    if "\n\n\n" in text:
        text = re.sub("\n{3,}", "\n\n", text)
    return text.strip()
