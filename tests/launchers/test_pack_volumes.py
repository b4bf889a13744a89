"""A hospital's folder of CT with everything wrong that can be: each file is packed or refused by name, none is lost."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.tasks.fvlm import FVLM
from launchers import pack
from shards.collate import ALL_CUT, NONE_THERE, TELLS_OF_NONE
from shards.decode_volume import VolumeDecoder
from shards.loader import Loader
from shards.manifest import Manifest
from shards.tokenizer import train_wordpiece
from tests.core.test_fvlm import CONFIG, TEXT, VISION, loss_of
from tests.shards.test_dicom_ct import body as dicom_body
from tests.shards.test_dicom_ct import write_series
from tests.shards.test_nifti import AFFINE, body, labels_of, save

MAPPING = """
table = "t.csv"
[columns]
file = "file"
patient = "patient"
split = "split"
[report]
findings = "findings"
"""
LIVER = "The liver is enlarged."
SEES_NO_ANATOMY = "Compared with the prior examination there is no change."
UNKNOWN_IDS = "mask ids unknown to the class map totalseg_v2"


def odd_volumes(folder: Path) -> dict[str, tuple[str, bool]]:
    """Writes volumes, masks, table and mapping. File -> (its reason, whether it is packed all the same)."""
    noise = np.random.default_rng(3)
    shape = body().shape

    def other(*sizes: int) -> np.ndarray:
        return noise.integers(-1000, 400, sizes).astype(np.int16)

    deep = body((24, 22, 2))
    low = body()
    low[0] = -3600
    empty, strange = np.zeros(shape, np.uint8), labels_of(shape)
    strange[0, 0, 0] = 200
    nothing = np.full(shape, np.nan, np.float32)
    volumes: dict[str, tuple[np.ndarray, np.ndarray | None, str, bool]] = {
        "whole": (body(), labels_of(shape), "", True),
        "told of nothing": (body(), labels_of(shape), "", True),
        "one slice": (other(24, 22, 1), labels_of(shape)[:, :, :1], "mask without any anatomy", True),
        "2000 slices": (np.repeat(deep[:8, :8], 1000, axis=2), np.full((8, 8, 2000), 5, np.uint8), "", True),
        "low": (low, labels_of(shape), "", True),
        "floats": (body() + np.float32(0.25), labels_of(shape), "", True),
        "empty mask": (body(), empty, "mask without any anatomy", True),
        "no mask": (body(), None, "volume without a mask", True),
        "nan": (nothing, labels_of(shape), "no voxel is a number", False),
        "infinite": (np.full(shape, np.inf, np.float32), labels_of(shape), "infinite voxels", False),
        "flat": (np.zeros(shape, np.int16), labels_of(shape), "volume of one flat value", False),
        "too high": (np.full(shape, 70_000, np.int32), labels_of(shape), "HU beyond 16 bits", False),
        "4D": (other(4, 4, 4, 2), None, "4D volume", False),
        "other grid": (body(), np.full((12, 11, 5), 5, np.uint8), "mask of another grid", False),
        "unknown ids": (body(), strange, UNKNOWN_IDS, False),
        "truncated": (body(), labels_of(shape), "truncated or damaged file", False),
        "empty file": (body(), labels_of(shape), "file has 0 bytes", False),
    }
    for name, (voxels, mask, _, _) in volumes.items():
        save(folder / f"{name}.nii.gz", voxels)
        if mask is not None:
            save(folder / "masks" / f"{name}.nii.gz", mask, AFFINE)
    cut = folder / "truncated.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-2000])
    (folder / "empty file.nii.gz").write_bytes(b"")
    expected = {f"{name}.nii.gz": (reason, kept) for name, (_, _, reason, kept) in volumes.items()}
    expected |= {"gone.nii.gz": ("file missing", False), "../out.nii.gz": ("file outside the image folder", False)}
    write_table(folder, dict.fromkeys(expected, LIVER) | {"told of nothing.nii.gz": SEES_NO_ANATOMY})
    return expected


def write_table(folder: Path, reports: dict[str, str]) -> None:
    """Table and mapping of files with their reports, each of a patient of its own."""
    with open(folder / "t.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "patient", "split", "findings"])
        table.writerows([name, number, "train", said] for number, (name, said) in enumerate(reports.items()))
    (folder / "mapping.toml").write_text(MAPPING)


def run(output: Path, *arguments: object) -> tuple[Manifest, list[dict[str, Any]]]:
    """(manifest, lines of refused.jsonl) of a pack."""
    common = ("--public", "--workers", 1, "--output", output)
    assert pack.main([str(argument) for argument in (*arguments, *common)]) == 0
    lines = (output / "refused.jsonl").read_text().splitlines()
    return Manifest.from_bytes((output / "manifest.json").read_bytes()), list(map(json.loads, lines))


def test_every_odd_volume_is_packed_or_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    expected = odd_volumes(folder)
    words = ("--source", "nifti", "--input", folder, "--masks", folder / "masks", "--own-spacing")
    words += ("--deidentified", "invented")
    manifest, lines = run(tmp_path / "out", *words)
    told = {name: (reason, kept) for name, (reason, kept) in expected.items() if reason}
    assert {line["input"]: (line["reason"], line.get("kept", False)) for line in lines} == told
    assert len(lines) == len(told) and manifest.samples == sum(kept for _, kept in expected.values())
    assert manifest.samples + sum(manifest.refused.values()) == len(expected)
    for counted, kept in ((manifest.refused, False), (manifest.noted, True)):
        assert counted == Counter(reason for reason, was_kept in told.values() if was_kept is kept)
    left_out, packed = capsys.readouterr().out.split("packed, with a remark")
    for reason, kept in told.values():
        assert (reason in packed, reason in left_out) == (kept, not kept)


def test_studies_without_an_anatomy_to_train_on_are_named_with_the_cause(tmp_path: Path) -> None:
    shape = body().shape
    for number, mask in enumerate((labels_of(shape), labels_of(shape), np.zeros(shape, np.uint8), labels_of(shape))):
        save(tmp_path / "in" / f"{number}.nii.gz", body())
        save(tmp_path / "masks" / f"{number}.nii.gz", mask)
    write_table(tmp_path / "in", {f"{number}.nii.gz": SEES_NO_ANATOMY if number == 1 else LIVER for number in range(4)})
    words = ("--source", "nifti", "--input", tmp_path / "in", "--masks", tmp_path / "masks", "--own-spacing")
    run(tmp_path / "out", *words, "--reports", "structured")
    manifest = tmp_path / "out" / "manifest.json"
    assert train_on(manifest, (12, 24, 24)) == {TELLS_OF_NONE: 2, NONE_THERE: 2}  # whole volumes
    assert train_on(manifest, (2, 4, 4))[ALL_CUT] > 0


def test_a_users_folder_is_packed_by_the_mapping_to_start_from(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "in" / "scans" / f"{name}.nii.gz", body())
        save(tmp_path / "masks" / "scans" / f"{name}.nii.gz", labels_of(body().shape))
    rows = ["file,patient,accession,report_text"]
    rows += [f"scans/{name}.nii.gz,{study},S{study},{LIVER}" for name, study in (("a", 1), ("b", 1), ("c", 2))]
    (tmp_path / "in" / "reports.csv").write_text("\n".join(rows) + "\n")
    mapping = Path(__file__).parents[2] / "ci" / "data" / "mappings" / "ct_folder.toml"
    words = ["--source", "nifti", "--input", tmp_path / "in", "--mapping", mapping, "--masks", tmp_path / "masks"]
    words += ["--public", "--deidentified", "invented", "--fractions", "train=1", "--workers", 1, "--own-spacing"]
    assert pack.main([str(word) for word in (*words, "--output", tmp_path / "out")]) == 0
    manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert (manifest.samples, sum(shard.images for shard in manifest.shards)) == (2, 3)
    assert manifest.fields["masks"] == manifest.sections["report"] == 2 and not manifest.refused | manifest.noted


def train_on(manifest: Path, sides: tuple[int, int, int]) -> Counter[str]:
    """Takes two batches of fVLM on crops of `sides`, backward too; why studies counted for nothing in them."""
    events: list[dict[str, Any]] = []
    config = replace(CONFIG, vision=replace(VISION, volume_size=sides), anatomies=("liver", "heart", "spleen"))
    volume = VolumeDecoder.Config(
        size=sides, patch_size=VISION.fine_size, anatomies=config.anatomies, keep_cut_if_mentioned=False
    )
    data = Loader.Config(train=str(manifest), lanes=2, text_length=TEXT.max_length, volume=volume)
    tokenizer = train_wordpiece([LIVER, SEES_NO_ANATOMY] * 4, 80)
    loader = Loader(data, global_batch_size=4, seed=5, fields=FVLM.fields, tokenizer=tokenizer, on_event=events.append)
    task = config.build(vocab_size=tokenizer.vocab_size)
    counting = []
    with loader.start(0) as batches:
        for _ in range(2):
            batch = next(batches)
            loss = loss_of(task, batch).loss
            loss.backward()
            assert batch["valid"].all() and loss.isfinite()
            counting.append(int(batch["anatomy_intact"].any(dim=1).sum()))
    told = [event for event in events if event["step"] < 2]
    assert {event["event"] for event in told} == {"no_anatomy"} and len(told) == 8 - sum(counting)
    return Counter(event["cause"] for event in told)


def test_series_of_mixed_orientations_are_refused_file_by_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hu = dicom_body()
    turned = {"ImageOrientationPatient": lambda number: [1, 0, 0, 0, 1, 0] if number < 3 else [1, 0, 0, 0, 0, -1]}
    for study, values in enumerate(({}, turned)):
        uids = {"StudyInstanceUID": f"1.2.3.{study}", "SeriesInstanceUID": f"1.2.4.{study}", "PatientID": f"P{study}"}
        slices = {"SOPInstanceUID": lambda number, study=study: f"1.2.5.{study}.{number}"}
        write_series(tmp_path / "in" / str(study), hu, **(uids | slices | values))
    words = ("--source", "dicom_ct", "--input", tmp_path / "in", "--own-spacing", "--fractions", "train=1")
    manifest, lines = run(tmp_path / "out", *words)
    assert manifest.samples == 1 and len(lines) == len(hu)
    assert manifest.refused == {"slices of different orientation in one series": len(hu)} and not manifest.noted
