"""Class maps: sizes and ids of the public tables, every class known, every anatomy with its classes."""

from __future__ import annotations

import numpy as np
import pytest

from shards.errors import ConfigError
from shards.ingest.class_map import ANATOMY_IDS, class_map
from shards.reports.anatomy import ANATOMIES

# (model, id) -> name as the public list has it, around the places where the versions differ.
KNOWN = {
    ("totalseg_v1", 1): "spleen", ("totalseg_v1", 7): "aorta", ("totalseg_v1", 44): "heart_myocardium",
    ("totalseg_v1", 57): "colon", ("totalseg_v1", 82): "humerus_left", ("totalseg_v1", 104): "urinary_bladder",
    ("totalseg_v2", 7): "pancreas", ("totalseg_v2", 26): "vertebrae_S1", ("totalseg_v2", 51): "heart",
    ("totalseg_v2", 61): "atrial_appendage_left", ("totalseg_v2", 79): "spinal_cord",
    ("totalseg_v2", 92): "rib_left_1", ("totalseg_v2", 117): "costal_cartilages",
}  # fmt: skip
OF_NO_USE = {
    "thyroid_gland", "prostate", "pulmonary_vein", "brachiocephalic_trunk", "subclavian_artery_right",
    "subclavian_artery_left", "common_carotid_artery_right", "common_carotid_artery_left",
    "brachiocephalic_vein_left", "brachiocephalic_vein_right", "superior_vena_cava", "spinal_cord", "skull", "sternum",
    "costal_cartilages",
}  # fmt: skip


@pytest.mark.parametrize(("model", "classes"), [("totalseg_v1", 104), ("totalseg_v2", 117)])
def test_tables_have_the_classes_of_the_public_lists(model: str, classes: int) -> None:
    found = class_map(model)
    assert sorted(found.ids) == list(range(1, classes + 1))
    assert len(set(found.ids.values())) == classes
    assert {number: found.ids[number] for (name, number) in KNOWN if name == model} == {
        number: text for (name, number), text in KNOWN.items() if name == model
    }


def test_every_class_has_its_anatomy() -> None:
    first, second = class_map("totalseg_v1"), class_map("totalseg_v2")
    assert set(first.anatomy_of.values()) == set(ANATOMIES)
    assert {name for name, anatomy in second.anatomy_of.items() if anatomy is None} == OF_NO_USE
    assert set(ANATOMIES) - set(second.anatomy_of.values()) == {"face", "pulmonary artery"}
    assert sum(anatomy == "lung" for anatomy in second.anatomy_of.values()) == 5
    assert sum(anatomy == "rib" for anatomy in second.anatomy_of.values()) == 24
    assert {name for name, anatomy in second.anatomy_of.items() if anatomy == "heart"} == {
        "heart", "atrial_appendage_left",
    }  # fmt: skip
    assert second.anatomy_of["vertebrae_S1"] == "sacrum"


def test_the_table_takes_ids_to_anatomies() -> None:
    found = class_map("totalseg_v2")
    table = found.table()
    assert table.dtype == np.uint8 and table[0] == 0
    assert table[[2, 3, 23]].tolist() == [ANATOMY_IDS["kidney"]] * 3
    assert table[91] == 0 and found.known()[91]
    assert len(found.known()) == 118


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ConfigError, match="totalseg_v1, totalseg_v2"):
        class_map("totalseg_v3")
