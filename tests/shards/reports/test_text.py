"""Repair of report text: every encoding and mark of old systems, what is counted, and what is refused."""

from __future__ import annotations

import contextlib
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import DataError
from shards.reports.text import MAX_SIZE, Cleaned, clean

FRENCH = "Épanchement pleural à gauche, opacité très étendue ; côte fêlée"


@pytest.mark.parametrize("charset", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_every_charset_gives_the_same_document(charset: str) -> None:
    assert clean(FRENCH.encode(charset)).text == FRENCH


@pytest.mark.parametrize("charset", ["cp850", "mac_roman"])
def test_accents_tell_dos_and_macintosh_from_windows(charset: str) -> None:
    assert clean(FRENCH.encode(charset)) == Cleaned(text=FRENCH, repairs={"charset": 1})


def test_two_charsets_in_one_file_are_each_read_as_their_own() -> None:
    assert clean("Fracture déplacée. ".encode() + "Réduite.".encode("cp1252")).text == "Fracture déplacée. Réduite."


def test_utf8_once_read_as_windows_is_read_again() -> None:
    broken = FRENCH.replace("à ", "à d’").encode().decode("cp1252")
    assert clean(broken) == Cleaned(text=FRENCH.replace("à ", "à d’"), repairs={"mojibake": 9})
    assert clean("ÂGE : 80 ANS, « FORÊT », “DÉPLACÉ”").repairs == {}


def test_composed_and_decomposed_accents_are_one_document() -> None:
    cleaned = clean(unicodedata.normalize("NFD", FRENCH))
    assert cleaned.text == FRENCH
    assert cleaned.repairs["composed"] == len(unicodedata.normalize("NFD", FRENCH)) - len(FRENCH)


@pytest.mark.parametrize(
    ("raw", "text", "kind", "count"),
    [
        ("pneumo\u00adthorax and pleu\u00ad\nral", "pneumothorax and pleural", "soft_hyphens", 2),
        ("no\u200b effusion\ufeff", "no effusion", "zero_width", 2),
        ("\u202bleft\u202c lung\u200f", "left lung", "direction_marks", 3),
        ("5\u00a0mm\u202f:\tstable", "5 mm : stable", "spaces", 3),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour", "line_ends", 3),
        ("clear\x00 lungs, no effusion\x07", "clear lungs, no effusion", "controls", 2),
        ("l\x92aorte", "l’aorte", "controls", 1),
        ("ﬁbrosis", "fibrosis", "ligatures", 1),
        ("\uf0b7 Clear", "• Clear", "bullets", 1),
        ("a\ud800b", "a\ufffdb", "broken", 1),
        ("e" + "\u0301\u0316" * 50, "é" + "\u0316" * 4 + "\u0301" * 3, "surplus_marks", 1),
    ],
)
def test_each_kind_of_mark_is_repaired_and_counted(raw: str, text: str, kind: str, count: int) -> None:
    cleaned = clean(raw)
    assert cleaned.text == text
    assert cleaned.repairs[kind] == count


def test_markup_leaves_lines_and_cells_but_no_comparison_is_taken_for_a_tag() -> None:
    raw = (
        "<!-- form --><p class=x>Nodule &lt; 5&nbsp;mm in <b>left</b> lobe</p><script>if (a < b) c()</script>"
        "<table><tr><td>Aorta</td><td>32 mm</td></tr><tr><td>Heart</td><td>normal</td></tr></table>"
    )
    assert clean(raw).text == "Nodule < 5 mm in left lobe\n\nAorta 32 mm\nHeart normal"
    assert (
        clean("diameter <5 mm and >3 mm, p<0.05, <name>, R&D").text == "diameter <5 mm and >3 mm, p<0.05, <name>, R&D"
    )
    assert clean("&amp;lt;br/&amp;gt;Normal.&amp;eacute;").text == "Normal.é"  # escaped twice on its way


def test_white_space_is_single_and_paragraphs_stay() -> None:
    assert clean("  a  b \n\n\n\n c \n d\n").text == "a b\n\nc\nd"


@pytest.mark.parametrize("raw", ["", b"", "a", b"a", " \n", b"\xef\xbb\xbf"])
def test_empty_and_one_character_reports_are_documents(raw: bytes | str) -> None:
    assert clean(raw).text in ("", "a")


@pytest.mark.parametrize(
    "raw",
    [
        b"%PDF-1.7 secret",
        "%PDF-1.7 secret",
        "\ufeff\n '%PDF-1.7 secret",
        "JVBERi0xLjQKsecret",
        bytes(range(256)) * 4,
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR secret",
        "secret\x00\x01\x02\x03",
        b"secret " * (MAX_SIZE // 7 + 1),
        "secret " * (MAX_SIZE // 7 + 1),
    ],
    ids=[
        "pdf",
        "pdf in a cell",
        "pdf behind a mark",
        "pdf in base64",
        "bytes",
        "png",
        "controls",
        "large bytes",
        "large text",
    ],
)
def test_what_is_no_report_is_refused_without_a_word_of_it(raw: bytes | str) -> None:
    with pytest.raises(DataError, match=r"^report (of \d+|is)") as error:
        clean(raw)
    assert "secret" not in str(error.value)


RTF = r"{\rtf1\ansi{\fonttbl\f0 Arial;}\f0 FINDINGS: Panchement \'e9lev\'e9.\par IMPRESSION: Normal.}"


@pytest.mark.parametrize("raw", [RTF, RTF.encode()])
def test_rtf_is_refused_without_the_extra_that_reads_it(raw: bytes | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "striprtf.striprtf", None)
    with pytest.raises(DataError, match=r"^report is an RTF file; pip install striprtf"):
        clean(raw)


@pytest.mark.parametrize("raw", [RTF, RTF.encode()])
def test_rtf_gives_its_text(raw: bytes | str) -> None:
    pytest.importorskip("striprtf")
    found = clean(raw)
    assert found.text == "FINDINGS: Panchement élevé.\nIMPRESSION: Normal." and found.repairs["rtf"] == 1


def pdf(*pages: bytes) -> bytes:
    """Pages in a built-in font; each of `pages` is what it draws."""
    count = len(pages)
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(count))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, count),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]  # fmt: skip
    for number, page in enumerate(pages):
        objects += [
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents %d 0 R/Resources<</Font<</F1 3 0 R>>>>>>"
            % (5 + 2 * number),
            b"<</Length %d>>stream\n%s\nendstream" % (len(page), page),
        ]
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(body))
        body += b"%d 0 obj%sendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    return body + b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        size, table, size, len(body),
    )  # fmt: skip


def page(*lines: str) -> bytes:
    """What draws these lines below each other."""
    drawn = " ".join(f"({line}) Tj 0 -20 Td" for line in lines)
    return f"BT /F1 12 Tf 50 700 Td {drawn} ET".encode("cp1252")


def test_pdf_is_refused_without_the_extra_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(DataError, match=r"^report is a PDF file; pip install pypdf"):
        clean(pdf(b"BT ET"))


def test_pdf_gives_its_text() -> None:
    pytest.importorskip("pypdf")
    found = clean(pdf("BT /F1 12 Tf 50 700 Td (Fracture déplacée.) Tj 0 -20 Td (Os sain.) Tj ET".encode("cp1252")))
    assert found.text == "Fracture déplacée.\nOs sain." and found.repairs["pdf"] == 1
    with pytest.raises(DataError, match=r"^report is a PDF file without text;"):
        clean(pdf(b"0 0 100 100 re f"))
    with pytest.raises(DataError, match=r"^report is a broken PDF file \("):
        clean(b"%PDF-1.7 secret")


def test_headings_that_all_pages_repeat_are_kept_once() -> None:
    pytest.importorskip("pypdf")
    heading = ("Clinique du Lac", "Patient 4711")
    found = clean(pdf(
        page(*heading, "Radiographie du genou.", "Gonarthrose avec pincement", "Page 1/3"),
        page(*heading, "de l'interligne.", "Pas de fracture.", "Page 2/3"),
        page(*heading, "Conclusion : gonarthrose.", "Page 3/3"),
    ))  # fmt: skip
    assert found.text.splitlines() == [
        *heading, "Radiographie du genou.", "Gonarthrose avec pincement", "de l'interligne.", "Pas de fracture.", "",
        "Conclusion : gonarthrose.", "Page 3/3",
    ]  # fmt: skip
    assert found.repairs["pdf page heading"] == 1
    # Pages that share nothing at their edges lose nothing.
    apart = clean(pdf(page("Os sain.", "Fin."), page("Main gauche.", "Os sain.")))
    assert apart.text == "Os sain.\nFin.\n\nMain gauche.\nOs sain." and not apart.repairs["pdf page heading"]


def test_largest_reports_of_one_repeated_mark_end_in_time() -> None:
    for unit in ("<!--", "<p ", "<script>", "&amp;", "&#38;", "a\u0301\u0316", "\u0301\u0316", " ", "\n ", "Ã©", "<"):
        clean(unit * (100_000 // len(unit)))


@given(st.text())
def test_clean_text_needs_no_further_repair(raw: str) -> None:
    try:
        document = clean(raw).text
    except DataError:
        return
    assert unicodedata.is_normalized("NFC", document)
    document.encode()  # no lone surrogate is left
    assert document == document.strip()
    assert not any(pair in document for pair in ("  ", " \n", "\n ", "\n\n\n", "\r", "\t", "\xa0"))


@given(st.binary())
def test_any_bytes_are_a_document_or_refused(raw: bytes) -> None:
    with contextlib.suppress(DataError):
        clean(raw).text.encode()


@given(
    st.lists(st.sampled_from(["No", "effusion.", "Épanchement", "3.5", "cm", "<5", "(left)", "R&D;", "XXXX", "95 %"]))
)
def test_words_are_never_changed(words: list[str]) -> None:
    assert clean("\u00a0\n".join(words)).text.split() == " ".join(words).split()
