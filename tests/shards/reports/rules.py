"""The detector that tests of single rules use: rules alone, without the learned layer."""

from __future__ import annotations

from shards.reports.identity import Detector

RULES = Detector(config=Detector.Config(learned=None))
