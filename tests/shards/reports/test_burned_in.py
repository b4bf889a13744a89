"""The 35-character rule, with an engine that returns what it is told, and with the real one where it is installed."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from shards.errors import ConfigError
from shards.ingest.dicom import DicomRadiographs
from shards.ingest.table import TableMapping, TableSource
from shards.ingest.view_files import ImageFiles
from shards.reports.identity.burned_in import (
    REASON,
    BurnedInText,
    Reader,
    has_burned_in_text,
    recognised_characters,
)
from shards.writer import WriterConfig, write_shards
from tests.shards.test_dicom import write

IMAGE = np.zeros((8, 8), dtype=np.uint16)


@pytest.mark.parametrize(("count", "dropped"), [(34, False), (35, True)])
def test_thirty_five_characters_drop_an_image(count: int, dropped: bool) -> None:
    assert has_burned_in_text(IMAGE, lambda image: [("x" * (count - 1), 0.9), (" 7.", 0.9)]) is dropped


def test_doubtful_pieces_do_not_count_and_the_engine_sees_eight_bits() -> None:
    seen = []

    def reader(image: np.ndarray) -> list[tuple[str, float]]:
        seen.append(image)
        return [("ribs that look like letters, many of them", 0.1), ("L", 0.9)]

    image = np.arange(64, dtype=np.uint16).reshape(8, 8) * 900
    assert recognised_characters(image, reader) == 1
    assert seen[0].dtype == np.uint8
    assert (seen[0].min(), seen[0].max()) == (0, 255)


def test_colour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        recognised_characters(np.zeros((8, 8, 3), dtype=np.uint8), lambda image: [])


def test_missing_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ConfigError, match="pip install rapidocr-onnxruntime"):
        BurnedInText()


def speaks_of_bright_images(image: np.ndarray) -> list[tuple[str, float]]:
    return [("DOSE REPORT OF MRS QUINTRELL, TOTAL DLP 512", 0.9)] if image.mean() > 100 else [("L", 0.9)]


def stub() -> Reader:
    return speaks_of_bright_images


def picture(level: int) -> np.ndarray:
    image = np.full((64, 48), level, dtype=np.uint8)
    image[0, 0], image[0, 1] = 0, 255
    return image


def test_image_files_and_dicom_with_text_are_refused_and_counted(tmp_path: Path) -> None:
    for name, level in (("a", 200), ("b", 30)):
        Image.fromarray(picture(level)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("file,patient,nodule\na.png,1,1\nb.png,2,0\n")
    columns = {"columns": {"file": "file", "patient": "patient"}, "labels": {"columns": {"N": {"column": "nodule"}}}}
    check = pickle.loads(pickle.dumps(BurnedInText(stub)))
    table = TableSource(
        input=tmp_path,
        mapping=TableMapping.model_validate({"table": "t.csv"} | columns),
        files=ImageFiles(folder=tmp_path, burned_in=check),
    )
    manifest = write_shards(table, str(tmp_path / "table"), WriterConfig(fractions={"train": 1.0}))
    assert manifest.samples == 1 and manifest.refused == {REASON: 1}
    for uid, level in (("1", 200), ("2", 30)):
        pixels = picture(level).astype(np.uint16) * 16
        names = {"StudyInstanceUID": f"1.2.{uid}", "SOPInstanceUID": f"1.2.3.{uid}"}
        write(tmp_path / "dicom" / f"{uid}.dcm", pixels, **names)
    source = DicomRadiographs(folder=tmp_path / "dicom", burned_in=check)
    manifest = write_shards(source, str(tmp_path / "out"), WriterConfig(fractions={"train": 1.0}))
    assert manifest.samples == 1 and manifest.refused == {REASON: 1}
    assert b"QUINTRELL" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_real_engine_reads_letters_drawn_on_noise() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    noise = Image.fromarray(np.random.default_rng(0).normal(90, 25, (256, 384)).clip(0, 255).astype(np.uint8))
    check = BurnedInText()
    assert check.refusal(np.asarray(noise)) is None
    draw = ImageDraw.Draw(noise)
    for row, line in enumerate(("QUINTRELL JANE 1931-02-03", "HOPITAL SAINT-LUC ID 4411-77")):
        draw.text((12, 12 + 40 * row), line, fill=255, font=ImageFont.load_default(size=20))
    assert check.refusal(np.asarray(noise)) == REASON
