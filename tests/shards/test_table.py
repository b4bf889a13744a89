"""The table source: mapping, labels, text, images; each bad input is a one-line error or a counted refusal."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin

from shards.batch import Sample
from shards.errors import ConfigError, DataError
from shards.ingest import Refusal, key_fingerprint, read_key_file
from shards.ingest.image_file import ImageLimits, ImageRefusedError, StoredImage, load_image_file
from shards.ingest.table import TableMapping, TableSource, parse_age
from shards.writer import WriterConfig, write_shards
from tests.shards.sources import encoded

ROOT = Path(__file__).parents[2]
MAPPING: dict[str, Any] = {
    "table": "t.csv",
    "columns": {"file": "file", "patient": "patient"},
    "labels": {"column": "labels", "names": ["Nodule", "Mass"], "normal": ["No Finding"]},
    "template": {"words": {"Nodule": "a lung nodule"}},
}
PUBLIC_TEXT = "written for publication"


def make(
    folder: Path,
    rows: str | bytes,
    *,
    images: Mapping[str, bytes] | None = None,
    mapping: Mapping[str, Any] | None = None,
    **options: Any,
) -> TableSource:
    """A source over a new folder; each image named in `rows` as a.jpg ... e.jpg exists unless given otherwise."""
    (folder / "t.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    for number, name in enumerate("abcde"):
        (folder / f"{name}.jpg").write_bytes(encoded(number))
    for name, data in (images or {}).items():
        (folder / name).write_bytes(data)
    return TableSource(input=folder, mapping=TableMapping.model_validate(MAPPING | dict(mapping or {})), **options)


def run(source: TableSource) -> tuple[dict[str, Sample], list[Refusal]]:
    """(first report or file -> sample, refusals) of everything a source gives."""
    plan = source.plan()
    refusals = list(plan.refusals)
    samples = {}
    for item in plan.items:
        loaded = source.load(item)
        refusals += loaded.refusals
        if loaded.sample is not None:
            samples[item.payload.views[0].file] = loaded.sample
    return samples, refusals


class TestRows:
    def test_labels_and_template(self, tmp_path: Path) -> None:
        rows = "file,patient,labels\na.jpg,1,Nodule|Mass\nb.jpg,1,No Finding\nc.jpg,2,Mass\n"
        samples, refusals = run(make(tmp_path, rows))
        assert refusals == []
        assert samples["a.jpg"].record.labels == {"Nodule": 1, "Mass": 1}
        assert samples["b.jpg"].record.labels == {"Nodule": 0, "Mass": 0}
        assert samples["a.jpg"].record.report == {"findings": "There is a lung nodule. There is mass."}
        assert samples["b.jpg"].record.report == {"findings": "No acute finding."}
        assert samples["a.jpg"].record.patient == samples["b.jpg"].record.patient != samples["c.jpg"].record.patient
        assert "template" in str(samples["a.jpg"].record.deidentifier)

    def test_views_of_one_study(self, tmp_path: Path) -> None:
        rows = (
            "file,patient,labels,study,view,sex,age\n"
            "a.jpg,1,Nodule,s1,pa,female,058Y\nb.jpg,1,No Finding,s1,LATERAL,,\n"
            "c.jpg,2,No Finding,s2,Jane Doe 12/3,x,430\n"
        )
        columns = {"file": "file", "patient": "patient", "study": "study", "view": "view", "sex": "sex", "age": "age"}
        samples, refusals = run(make(tmp_path, rows, mapping={"columns": columns}))
        record = samples["a.jpg"].record
        assert refusals == [] and len(samples) == 2
        assert [view.view for view in record.views] == ["PA", "LATERAL"] and len(samples["a.jpg"].images) == 2
        assert record.labels == {"Nodule": 1, "Mass": 0}
        assert (record.sex, record.age_years) == ("F", 58)
        other = samples["c.jpg"].record
        assert (other.sex, other.age_years, other.views[0].view) == (None, None, None)

    def test_label_columns(self, tmp_path: Path) -> None:
        rows = "file,patient,n,m\na.jpg,1,1,YES\nb.jpg,1,-1.0,NO\nc.jpg,1,,NO\nd.jpg,1,2,NO\ne.jpg,1,0,MAYBE\n"
        labels = {"columns": {"Nodule": {"column": "n"}, "Mass": {"column": "m", "values": {"YES": 1, "NO": 0}}}}
        samples, refusals = run(make(tmp_path, rows, mapping={"labels": labels}))
        assert samples["a.jpg"].record.labels == {"Nodule": 1, "Mass": 1}
        assert samples["b.jpg"].record.labels == {"Nodule": -1, "Mass": 0}
        assert samples["c.jpg"].record.labels == {"Mass": 0}
        assert refusals == [Refusal("d.jpg", "label outside 0, 1, -1"), Refusal("e.jpg", "label outside 0, 1, -1")]

    @pytest.mark.parametrize(
        ("row", "name", "reason"),
        [
            (b"a.jpg,1,Nodul", "a.jpg", "label name that the mapping does not know"),
            (b"a.jpg,,Nodule", "a.jpg", "row without a patient"),
            (b",1,Nodule", "row 2", "row without a file name"),
            (b"a.jpg,1", "row 2", "row with too few or too many cells"),
            (b"a.jpg,1,Nodule,x", "row 2", "row with too few or too many cells"),
            (b"e.jpg,1,Nodule", "e.jpg", "duplicate key: file named by an earlier row"),
            (b"a.jpg,1,\xff\xfe", "row 2", "text not UTF-8"),
            (b"a.jpg,1,", "a.jpg", "report empty and no label"),
            (b"z.jpg,1,Nodule", "z.jpg", "image missing"),
            (b"../t/a.jpg,1,Nodule", "../t/a.jpg", "file outside the image folder"),
            (b"/etc/passwd,1,Nodule", "/etc/passwd", "file outside the image folder"),
        ],
    )
    def test_bad_row_is_refused_alone(self, tmp_path: Path, row: bytes, name: str, reason: str) -> None:
        rows = b"file,patient,labels\ne.jpg,9,Mass\n" + row + b"\nb.jpg,2,No Finding\n"
        samples, refusals = run(make(tmp_path, rows))
        assert refusals == [Refusal(name, reason)]
        assert set(samples) == {"e.jpg", "b.jpg"}

    def test_study_of_two_patients(self, tmp_path: Path) -> None:
        rows = "file,patient,labels,study\na.jpg,1,Mass,s\nb.jpg,2,Mass,s\n"
        columns = {"file": "file", "patient": "patient", "study": "study"}
        _, refusals = run(make(tmp_path, rows, mapping={"columns": columns}))
        assert refusals == [
            Refusal("a.jpg", "study of several patients"),
            Refusal("b.jpg", "study of several patients"),
        ]

    def test_bad_view_leaves_the_study(self, tmp_path: Path) -> None:
        rows = "file,patient,labels,study\na.jpg,1,Mass,s\nbad.jpg,1,Mass,s\nb.jpg,1,Mass,s\n"
        columns = {"file": "file", "patient": "patient", "study": "study"}
        source = make(tmp_path, rows, images={"bad.jpg": b"\xff\xd8nonsense"}, mapping={"columns": columns})
        samples, refusals = run(source)
        assert refusals == [Refusal("bad.jpg", "image does not decode: no image header")]
        assert [view.id for view in samples["a.jpg"].record.views] == ["0", "1"]

    def test_patient_in_two_splits_stops(self, tmp_path: Path) -> None:
        rows = "file,patient,labels,split\na.jpg,1,Mass,train\nb.jpg,1,Mass,test\n"
        columns = {"file": "file", "patient": "patient", "split": "split"}
        source = make(tmp_path, rows, mapping={"columns": columns})
        with pytest.raises(DataError, match="is in splits test and train"):
            write_shards(source, str(tmp_path / "out"))

    def test_parquet_gives_the_same(self, tmp_path: Path) -> None:
        rows = "file,patient,labels\na.jpg,1,Nodule\nb.jpg,2,No Finding\nc.jpg,3,\n"
        expected = run(make(tmp_path, rows))
        pd.read_csv(tmp_path / "t.csv").to_parquet(tmp_path / "t.parquet")
        source = TableSource(input=tmp_path, mapping=TableMapping.model_validate(MAPPING | {"table": "t.parquet"}))
        assert run(source) == expected

    def test_byte_order_mark_and_quotes(self, tmp_path: Path) -> None:
        rows = '\ufefffile,patient,labels\n"a.jpg","1","Nodule"\n'
        assert set(run(make(tmp_path, rows))[0]) == {"a.jpg"}

    @pytest.mark.parametrize(
        ("text", "years"),
        [("58", 58), ("058Y", 58), ("006M", 0.5), ("", None), ("411", None), ("old", None), ("-3", None)],
    )
    def test_age(self, text: str, years: float | None) -> None:
        assert parse_age(text) == years


class TestText:
    ROWS = "file,patient,labels,note\na.jpg,1,Mass,Große Raumforderung.\nb.jpg,2,,  \nc.jpg,3,Mass,\n"

    def test_needs_the_users_statement(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"report text from column note; .*--deidentified 'HOW'"):
            make(tmp_path, self.ROWS, mapping={"report": {"findings": "note"}})

    def test_statement_is_recorded(self, tmp_path: Path) -> None:
        mapping = {"report": {"findings": "note"}, "language": "de", "template": None}
        samples, refusals = run(make(tmp_path, self.ROWS, mapping=mapping, deidentified=PUBLIC_TEXT))
        assert samples["a.jpg"].record.report == {"findings": "Große Raumforderung."}
        assert samples["a.jpg"].record.deidentifier == PUBLIC_TEXT
        assert samples["a.jpg"].record.language == "de"
        assert samples["c.jpg"].record.report == {} and samples["c.jpg"].record.deidentifier is None
        assert refusals == [Refusal("b.jpg", "report empty and no label")]


class TestNames:
    ROWS = "file,patient,labels\na.jpg,Jane Doe,Mass\nz.jpg,John Roe,Mass\n"

    def test_with_a_secret_no_name_is_left(self, tmp_path: Path) -> None:
        source = make(tmp_path, self.ROWS, secret=b"0123456789abcdef")
        samples, refusals = run(source)
        shown = repr((source.plan().items[0].key, samples["a.jpg"].record, refusals, source))
        assert "Jane" not in shown and "a.jpg" not in shown and "z.jpg" not in shown and "0123456789" not in shown
        assert len(refusals[0].name) == 32
        other = make(tmp_path, self.ROWS, secret=b"another secret!!")
        assert other.plan().items[0].key != source.plan().items[0].key
        assert source.key_fingerprint == key_fingerprint(b"0123456789abcdef") != other.key_fingerprint

    def test_shards_hold_no_name(self, tmp_path: Path) -> None:
        source = make(tmp_path, self.ROWS, secret=b"0123456789abcdef")
        write_shards(source, str(tmp_path / "out"), WriterConfig(fractions={"train": 1.0}))
        for path in (tmp_path / "out").rglob("*"):
            if path.is_file():
                body = path.read_bytes()
                assert not any(word in body for word in (b"Jane", b"John", b"a.jpg", b"z.jpg", b"0123456789abcdef"))

    def test_key_file(self, tmp_path: Path) -> None:
        path = tmp_path / "site.key"
        with pytest.raises(ConfigError, match=r"No such file.*openssl rand"):
            read_key_file(path)
        path.write_bytes(b"0123456789abcdef\n")
        path.chmod(0o644)
        with pytest.raises(ConfigError, match="mode 0644 lets others read it; run `chmod 600"):
            read_key_file(path)
        path.chmod(0o600)
        assert read_key_file(path) == b"0123456789abcdef"
        path.write_bytes(b"short")
        with pytest.raises(ConfigError, match="5 bytes, needs 16"):
            read_key_file(path)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("", "empty file"),
            ("file,patient,labels\n", "no rows below the header"),
            (
                "file,patients,label\na,1,x\n",
                r"no column 'patient' \(columns.patient .*; nearest: patients",
            ),
            ("file,patient,labels,patient\na,1,x,1\n", "column 'patient' stands twice"),
        ],
    )
    def test_bad_table(self, tmp_path: Path, rows: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make(tmp_path, rows).plan()

    def test_missing_table_and_folder(self, tmp_path: Path) -> None:
        source = make(tmp_path, "x")
        (tmp_path / "t.csv").unlink()
        with pytest.raises(ConfigError, match=r"t\.csv: No such file"):
            source.plan()
        with pytest.raises(ConfigError, match="nowhere: no such folder"):
            TableSource(input=tmp_path / "nowhere", mapping=source.mapping).plan()

    def test_broken_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "t.parquet").write_bytes(b"no")
        source = TableSource(input=tmp_path, mapping=TableMapping.model_validate(MAPPING | {"table": "t.parquet"}))
        with pytest.raises(ConfigError, match="not a Parquet table"):
            source.plan()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("table = ", "not TOML"),
            ('table = "t.csv"\n[columns]\nfile = "f"\n', "columns.patient: field required"),
            (
                'table = "t.csv"\n[columns]\nfile = "f"\npatient = "p"\npatent = "x"\n',
                "columns.patent: .*nearest: patient",
            ),
            ('tabel = "t.csv"\ntable="x"\n[columns]\nfile = "f"\npatient = "p"\n', "tabel: .*nearest: table"),
        ],
    )
    def test_bad_mapping(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "mapping.toml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            TableMapping.read(path)
        assert "\n" not in str(error.value)

    def test_missing_mapping(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            TableMapping.read(tmp_path / "mapping.toml")


def picture(pixels: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, form, **options)
    return buffer.getvalue()


def ramp(dtype: type = np.uint8, height: int = 40, width: int = 48) -> np.ndarray:
    return np.linspace(0, np.iinfo(dtype).max, height * width).reshape(height, width).astype(dtype)


BLACK = Image.new("L", (48, 40))


def decoded(stored: StoredImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored.encoded.data)))


class TestImages:
    def load(self, data: bytes) -> StoredImage:
        return load_image_file(data, ImageLimits())

    def test_plain_jpeg_is_stored_byte_for_byte(self) -> None:
        data = picture(np.repeat(np.arange(40, dtype=np.uint8)[:, None], 48, 1), "JPEG")
        stored = self.load(data)
        assert stored.encoded.data == data
        assert (stored.encoded.extension, stored.height, stored.width, stored.bits) == ("jpg", 40, 48, 8)

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_jpeg_loses_its_names_and_keeps_its_pixels(self, mode: str, options: dict[str, Any]) -> None:
        exif = Image.Exif()
        exif[0x010E] = "SECRET name"
        image = Image.fromarray(np.asarray(Image.open(io.BytesIO(encoded(3, 64, 64))))).convert(mode)
        data = picture(image, "JPEG", exif=exif, comment=b"SECRET comment", icc_profile=b"SECRET profile", **options)
        data += b"SECRET behind the end"
        stored = self.load(data)
        assert b"SECRET" in data and b"SECRET" not in stored.encoded.data
        np.testing.assert_array_equal(decoded(stored), np.asarray(Image.open(io.BytesIO(data))))

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_png_loses_its_text_and_keeps_its_pixels(self, dtype: type) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_text("Patient", "SECRET")
        text.add_itxt("Comment", "SECRET")
        stored = self.load(picture(ramp(dtype), "PNG", pnginfo=text))
        assert b"SECRET" not in stored.encoded.data and b"Patient" not in stored.encoded.data
        np.testing.assert_array_equal(decoded(stored), ramp(dtype))
        assert stored.bits == 8 * np.dtype(dtype).itemsize

    @pytest.mark.parametrize(("form", "mode"), [
        ("BMP", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "L"), ("GIF", "L"), ("WEBP", "RGB"),
        ("PNG", "1"), ("JPEG", "CMYK"),
    ])  # fmt: skip
    def test_other_kinds_become_grey_png(self, form: str, mode: str) -> None:
        image = Image.fromarray(ramp()).convert(mode)
        options = {"lossless": True} if form == "WEBP" else {}
        stored = self.load(picture(image, form, **options))
        assert stored.encoded.extension == "png" and decoded(stored).ndim == 2
        if mode not in ("1", "CMYK"):
            np.testing.assert_allclose(decoded(stored).astype(int), ramp().astype(int), atol=1)

    def test_16_bit_tiff_keeps_its_bits(self) -> None:
        stored = self.load(picture(ramp(np.uint16), "TIFF"))
        np.testing.assert_array_equal(decoded(stored), ramp(np.uint16))
        assert stored.bits == 16

    def test_rotation_is_applied(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        data = picture(ramp(), "JPEG", exif=exif, quality=95)
        stored = self.load(data)
        assert (stored.encoded.extension, stored.height, stored.width) == ("png", 48, 40)
        expected = np.rot90(np.asarray(Image.open(io.BytesIO(data))), -1)
        np.testing.assert_array_equal(decoded(stored), expected)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "image file has 0 bytes"),
            (b"hello", "image does not decode: no image header"),
            (encoded(0)[:-200], "image does not decode: OSError"),
            (encoded(0, extension="png")[:-300], "image does not decode"),
            (picture(np.zeros((1, 1), np.uint8), "PNG"), "image side below 32 pixels"),
            (picture(np.zeros((40, 31), np.uint8), "PNG"), "image side below 32 pixels"),
            (picture(np.zeros((64, 64), np.uint8), "PNG"), "image all black"),
            (picture(np.full((64, 64), 9, np.uint16), "PNG"), "image of one flat value"),
            (picture(ramp().astype(np.float32), "TIFF"), "image of floating-point values"),
            (picture(Image.fromarray(ramp()), "GIF", save_all=True, append_images=[BLACK]), "frames"),
        ],
    )
    def test_refused_with_a_reason(self, data: bytes, reason: str) -> None:
        with pytest.raises(ImageRefusedError, match=reason):
            self.load(data)

    def test_huge_image_is_refused_before_decoding(self) -> None:
        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"\0" * 99))
            + chunk(b"IEND", b"")
        )
        with pytest.raises(ImageRefusedError, match="image larger than 100000000 pixels"):
            self.load(data)

    def test_16_bit_colour_is_not_cut_to_8(self) -> None:
        data = bytearray(picture(Image.merge("RGB", [Image.fromarray(ramp())] * 3), "PNG"))
        data[24] = 16
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        with pytest.raises(ImageRefusedError, match=r"16-bit colour|does not decode"):
            self.load(bytes(data))

    def test_damaged_bytes_never_crash(self) -> None:
        originals = [encoded(1), encoded(1, extension="png"), picture(ramp(np.uint16), "TIFF")]
        for number, data in enumerate(originals * 20):
            body = bytearray(data)
            at = (number * 7919) % len(body)
            body[at : at + 3] = bytes(((number * 31) % 256, 255, 0))
            try:
                load_image_file(bytes(body), ImageLimits())
            except ImageRefusedError:
                continue


def pack(folder: Path, output: Path, mapping: Path, **options: Any) -> Any:
    source = TableSource(input=folder, mapping=TableMapping.read(mapping), **options)
    return write_shards(source, str(output), WriterConfig(shard_samples=64))


def test_bundled_set_packs(tmp_path: Path) -> None:
    folder = ROOT / "ci" / "data" / "nih_cxr"
    manifest = pack(folder, tmp_path, folder / "mapping.toml")
    assert (manifest.samples, manifest.refused) == (519, {})
    assert sum(manifest.patients.values()) == 346
    assert manifest.fields["report"] == manifest.fields["labels"] == 519
    assert manifest.fields["boxes"] == 30
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 5_500_000


@pytest.mark.parametrize(
    ("name", "options", "samples", "refused"),
    [
        ("kermany_peds_cxr", {}, 485, {}),
        ("covid_cxr", {"deidentified": PUBLIC_TEXT}, 206, {"report empty and no label": 11}),
    ],
)
def test_real_sets_pack(
    shared_data: Path, tmp_path: Path, name: str, options: dict[str, Any], samples: int, refused: dict[str, int]
) -> None:
    mapping = ROOT / "ci" / "data" / "mappings" / f"{name}.toml"
    manifest = pack(shared_data / name, tmp_path, mapping, **options)
    assert (manifest.samples, manifest.refused) == (samples, refused)


def test_raw_formats_pack_or_are_refused_by_name(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "raw_image_formats"
    names: Sequence[str] = sorted(path.name for path in folder.iterdir())
    (tmp_path / "t.csv").write_text("file,patient,labels\n" + "".join(f"{name},{name},Mass\n" for name in names))
    mapping = TableMapping.model_validate(MAPPING | {"images": str(folder)})
    samples, refusals = run(TableSource(input=tmp_path, mapping=mapping))
    assert len(samples) + len(refusals) == len(names)
    assert refusals == [Refusal("SOURCE.txt", "image does not decode: no image header")]


BOXES = {
    "table": "BBox_List_2017.csv", "file": "Image Index", "label": "Finding Label", "left": "Bbox [x", "top": "y",
    "width": "w", "height": "h]", "grid": (1024, 1024), "values": {"Lump": "Mass"},
}  # fmt: skip
HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"


class TestBoxes:
    ROWS = "file,patient,labels\nx/a.jpg,1,Mass\nb.jpg,2,Mass\n"

    def source(self, folder: Path, boxes: str, rows: str = ROWS, **mapping: Any) -> TableSource:
        (folder / "BBox_List_2017.csv").write_text(boxes)
        (folder / "x").mkdir(exist_ok=True)
        for place in ("x/a.jpg", "x/b.jpg"):
            (folder / place).write_bytes(encoded(1))
        return make(folder, rows, mapping={"boxes": BOXES | mapping})

    def test_the_layout_of_chestxray14(self, tmp_path: Path) -> None:
        source = self.source(tmp_path, HEADER + "a.png,Lump,256,128,512,64,,,\nx/a.jpg,Nodule,0,0,1024,1024,,,\n")
        samples, refusals = run(source)
        record = samples["x/a.jpg"].record
        height, width = record.views[0].height, record.views[0].width
        assert refusals == [] and samples["b.jpg"].record.boxes == []
        assert [box.label for box in record.boxes] == ["Mass", "Nodule"]
        first, whole = record.boxes
        assert (first.left, first.top) == (width / 4, height / 8)
        assert (first.width, first.height) == (width / 2, height / 16)
        assert (whole.left, whole.top, whole.width, whole.height) == (0, 0, width, height) and whole.view == "0"

    @pytest.mark.parametrize(
        ("row", "name", "reason"),
        [
            ("a.png,Mass,1,1,0,9,,,", "x/a.jpg", "box: empty"),
            ("a.png,Mass,1,1,nan,9,,,", "x/a.jpg", "box: empty"),
            ("a.png,Mass,1000,1,100,9,,,", "x/a.jpg", "box: outside the image"),
            ("a.png,,1,1,9,9,,,", "x/a.jpg", "box: no label"),
            ("a.png,Mass,1,1,,9,,,", "x/a.jpg", "box: not a number"),
            ("z.png,Mass,1,1,9,9,,,", "row 2 of boxes", "box: of a file that the table does not name"),
            ("a.png,Mass,1", "row 2 of boxes", "box: row with too few or too many cells"),
        ],
    )
    def test_a_bad_box_is_counted_and_its_image_kept(self, tmp_path: Path, row: str, name: str, reason: str) -> None:
        samples, refusals = run(self.source(tmp_path, HEADER + "b.png,Mass,9,9,99,99,,,\n" + row + "\n"))
        assert [(one.name, one.reason) for one in refusals] == [(name, reason)]
        assert samples["x/a.jpg"].record.boxes == [] and len(samples["b.jpg"].record.boxes) == 1

    @pytest.mark.parametrize(
        ("boxes", "mapping", "message"),
        [
            (HEADER + "z.png,Mass,1,1,9,9,,,\n", {}, "none of its 1 rows draws a box in a file that columns"),
            (HEADER + "b.png,Mass,1,1,9,9,,,\n", {}, "row 1 names its file without a folder, and several files"),
            ("file,x\na,1\n", {}, r"no column 'Image Index' \(boxes.file of the mapping\)"),
            (HEADER, {"table": "absent.csv"}, "absent.csv: No such file"),
        ],
    )
    def test_a_table_of_other_files_stops(
        self, tmp_path: Path, boxes: str, mapping: dict[str, Any], message: str
    ) -> None:
        source = self.source(tmp_path, boxes, self.ROWS + "x/b.jpg,3,Mass\n", **mapping)
        with pytest.raises(ConfigError, match=message):
            source.plan()

    def test_mappings_of_chestxray14_agree(self) -> None:
        ours = TableMapping.read(ROOT / "ci" / "data" / "nih_cxr" / "mapping.toml")
        theirs = TableMapping.read(ROOT / "ci" / "data" / "mappings" / "chestxray14.toml")
        assert ours.labels.names == theirs.labels.names and ours.template == theirs.template
        assert ours.boxes is not None and theirs.boxes is not None
        assert set(theirs.boxes.columns.values()) == set(HEADER.strip().rstrip(",").split(","))
        assert ours.boxes.grid == theirs.boxes.grid and ours.boxes.values == theirs.boxes.values
