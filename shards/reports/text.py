"""One report as it came, bytes or text, made into the document that every other part counts its spans in.

Characters are repaired (encoding, composition, invisible marks, markup, white space); no word is changed, added or
dropped, and every repair is counted by kind. What is no text is refused with the fault and none of its characters.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import ftfy

from shards.errors import DataError

MAX_SIZE = 5_000_000  # bytes or characters; a long CT report has 10,000
MAX_CONTROL_SHARE = 0.05
MAX_HIGH_BYTE_SHARE = 0.5  # of bytes that are no UTF-8; French in cp1252 has 0.04, compressed data 0.5 and controls
MAX_MARKUP_ROUNDS = 4  # markup escaped this many times over is unescaped; deeper is left as it is

FILE_SIGNATURES = (
    (b"%PDF", "a PDF file"),
    (b"{\\rtf", "an RTF file"),
    (b"PK\x03\x04", "a zip or Office file"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
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
ACCENTED_LETTERS = frozenset("àâäçèéêëîïôöùûüœßÀÂÄÇÈÉÊËÎÏÔÖÙÛÜŒ")

_UTF8_SEQUENCE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|([\x80-\xff])"
)
_MOJIBAKE = re.compile(
    r"[\u00c2-\u00c5\u00cb\u00ce\u00cf\u00e2][\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_BROKEN = re.compile(r"[\ud800-\udfff\ufffe\uffff]")
_LINE_END = re.compile(r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_SOFT_HYPHEN = re.compile(r"\u00ad\n?")
_ZERO_WIDTH = re.compile(r"[\u180e\u200b-\u200d\u2060\ufeff]")
_DIRECTION_MARK = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SPACE = re.compile(r"[\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
_LIGATURE = re.compile("[ﬀ-ﬆ]")
_SYMBOL_BULLET = re.compile("[\uf0a7\uf0b7\uf0d8\uf0fc]")  # bullets of the Symbol and Wingdings fonts
_UNUSUAL = re.compile(r"[^\n\x20-\x7e\u00a1-\u00ac\u00ae-\u017f\u2010-\u2027\u2030-\u205e\u2070-\u2fff]")

# Only names of HTML: "<5 mm" and "<patient>" stay.
_BLOCK = (
    "address|article|blockquote|body|br|caption|center|dd|div|dl|dt|h[1-6]|head|hr|html|li|ol|p|pre|section|table|tbody"
    "|tfoot|thead|title|tr|ul"
)
_INLINE = "a|abbr|acronym|b|big|em|font|i|img|input|label|link|mark|meta|o:p|s|small|span|strike|strong|sub|sup|tt|u"
_HIDDEN = re.compile(r"<!--.{0,20000}?-->|<(script|style)\b[^<>]{0,500}>.{0,20000}?</\1\s*>", re.I | re.S)
_BLOCK_TAG = re.compile(
    rf"</?(?:{_BLOCK})(?:\s[^<>]{{0,2000}})?/?>|<!doctype[^<>]{{0,500}}>|<\?xml[^<>]{{0,500}}>", re.I
)
_CELL_TAG = re.compile(r"</?(?:td|th|col|colgroup)(?:\s[^<>]{0,2000})?/?>", re.I)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]{{0,2000}})?/?>", re.I)
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
    text = _decode(raw, repairs) if isinstance(raw, bytes) else raw
    _refuse_binary(text)
    if "<" in text or "&" in text:
        text = _without_markup(text, repairs)
    if _UNUSUAL.search(text):
        text = _repair_characters(text, repairs)
    if not unicodedata.is_normalized("NFC", text):
        composed = unicodedata.normalize("NFC", text)
        repairs["composed"] += max(1, len(text) - len(composed))
        text = composed
    return Cleaned(text=_tidy(text), repairs=dict(repairs))


def _decode(raw: bytes, repairs: Counter[str]) -> str:
    for signature, kind in FILE_SIGNATURES:
        if raw.startswith(signature):
            raise DataError(f"report is {kind}; give its text")
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
    charset = max(OLD_CHARSETS, key=lambda name: sum(map(ACCENTED_LETTERS.__contains__, high.decode(name, "replace"))))
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
    controls = sum(1 for _ in _CONTROL.finditer(text)) + text.count("\ufffd")
    if controls > max(MAX_CONTROL_SHARE * len(text), 1):
        raise DataError(f"report of {len(text)} characters is binary: {controls} of them are control characters")


def _without_markup(text: str, repairs: Counter[str]) -> str:
    for _ in range(MAX_MARKUP_ROUNDS):  # escaped markup shows only after its entities are read
        text, hidden = _HIDDEN.subn(" ", text)
        text, blocks = _BLOCK_TAG.subn("\n", text)
        text, cells = _CELL_TAG.subn(" ", text)
        text, inline = _INLINE_TAG.subn("", text)
        text, entities = _ENTITY.subn(lambda match: html.unescape(f"&{match[1]};"), text)
        _count(repairs, "html_tags", hidden + blocks + cells + inline)
        _count(repairs, "html_entities", entities)
        if not entities:
            break
    return text


def _repair_characters(text: str, repairs: Counter[str]) -> str:
    text, count = _LINE_END.subn("\n", text)
    _count(repairs, "line_ends", count)
    if _MOJIBAKE.search(text):
        fixed = ftfy.fix_encoding(text)
        _count(repairs, "mojibake", int(fixed != text))
        text = fixed
    for kind, pattern, replacement in (
        ("soft_hyphens", _SOFT_HYPHEN, ""),
        ("zero_width", _ZERO_WIDTH, ""),
        ("direction_marks", _DIRECTION_MARK, ""),
        ("spaces", _SPACE, " "),
        ("bullets", _SYMBOL_BULLET, "•"),
        ("broken", _BROKEN, "\ufffd"),
    ):
        text, count = pattern.subn(replacement, text)
        _count(repairs, kind, count)
    text, count = _CONTROL.subn(_windows_character, text)
    _count(repairs, "controls", count)
    text, count = _LIGATURE.subn(lambda match: _LIGATURES[match[0]], text)
    _count(repairs, "ligatures", count)
    return text


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
