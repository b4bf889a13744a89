"""CLIP on CT volumes: the whole volume against the whole report, what fVLM is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from core.models.volume import VolumeEncoder
from core.tasks.clip import CLIP


class VolumeCLIP(CLIP):
    """A volume is the mean of its last tokens; everything else is CLIP's."""

    @dataclass(frozen=True, kw_only=True)
    class Config(CLIP.Config):
        """As CLIP's, with an encoder of volumes."""

        vision: VolumeEncoder.Config  # type: ignore[assignment]

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> VolumeCLIP:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return VolumeCLIP(self, vocab_size=vocab_size, seed=seed)
