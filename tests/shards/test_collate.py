"""What a batch says of a study's doubts: the grade of its degradation and its uncertain verdicts."""

from __future__ import annotations

from typing import Any

import pytest

from shards.batch import StudyRecord, ViewRecord
from shards.collate import _degradation_grade, _uncertain_verdicts


def record(**given: Any) -> StudyRecord:
    return StudyRecord(study="a", patient="b", views=[ViewRecord(id="0", height=8, width=8)], **given)


@pytest.mark.parametrize(
    ("provenance", "grade"),
    [
        ({}, -1.0),
        ({"degradation": "none", "degradation grade": 0.0}, 0.0),
        ({"degradation": "blur", "degradation grade": 0.75}, 0.75),
        ({"degradation grade": "severe"}, -1.0),
        ({"degradation grade": float("nan")}, -1.0),
        ({"degradation grade": -3}, -1.0),
    ],
)
def test_grade_of_degradation_is_known_or_below_zero(provenance: dict[str, Any], grade: float) -> None:
    assert _degradation_grade(record(provenance=provenance)) == grade


def test_uncertain_verdicts_are_counted() -> None:
    items = [{"verdict": verdict} for verdict in ("present", "uncertain", "absent", "uncertain")]
    assert _uncertain_verdicts(record(structured_report={"items": items})) == 2
    for without in (None, {}, {"items": None}, {"items": ["uncertain"]}):
        assert _uncertain_verdicts(record(structured_report=without)) == 0
