"""The resume benchmark without its measurements: extrapolation, the figures of the curve, the plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci.bench import resume


def test_line_follows_position_within_the_epoch() -> None:
    curve = resume.with_line({0.0: 1.0, 0.01: 3.0}, (0.0, 0.01, 0.5, 3.5))
    assert curve == pytest.approx({0.0: 1.0, 0.01: 3.0, 0.5: 101.0, 3.5: 101.0})


def test_curve_names_what_was_not_measured(tmp_path: Path) -> None:
    positions = (0.0, 0.5)
    peers = {"webdataset": {0.0: 2.0, 0.01: 3.0}, "energon": {0.0: 4.0}, "litdata": "not measured: absent"}
    figures = {one.id: one for one in resume._curve({0.0: 0.5, 0.5: 0.6}, peers, positions, 3)}
    assert figures["resume.vs_webdataset_at_0.5_epochs"].note == resume.EXTRAPOLATED
    assert figures["resume.vs_webdataset_at_0.5_epochs"].peer == pytest.approx(52.0)
    assert figures["resume.vs_energon_at_0_epochs"].value == pytest.approx(0.125)
    assert "resume.vs_energon_at_0.5_epochs" not in figures
    assert "not measured beyond 0 epochs" in figures["resume.vs_energon_beyond"].note
    assert figures["resume.vs_litdata"].note == "not measured: absent"
    resume.plot(list(figures.values()), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_file_held_open_is_in_use(tmp_path: Path) -> None:
    with open(tmp_path / "held", "w"):
        assert (tmp_path / "held") in resume._in_use()
    assert (tmp_path / "held") not in resume._in_use()
