"""How report text gets into studies as they are packed: through the pipeline, or from a file that passed it before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shards.batch import StudyRecord
from shards.errors import ConfigError, DataError
from shards.reports.identity import KnownPatient
from shards.reports.pipeline import WHOLE, Cell, Config, Failed, Pipeline, RawReport
from shards.reports.prepared import Place, PreparedFile, PreparedReport
from shards.reports.sections import SECTION_NAMES

OTHER_PATIENT = "prepared for another patient"
JOINS_TRIED = 20  # whether reports are of the patients here shows on the first ones; each is checked as it is packed


@dataclass(frozen=True)
class Structured:
    """`pack.py --reports structured`; goes to worker processes, where the pipeline is built once.

    `prepared`: a file of launchers/prepare_reports.py; without one, text passes the pipeline on its way into the study.
    """

    secret: bytes | None = field(repr=False)
    config: Config = field(default_factory=Config)
    prepared: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes the output. A prepared file counts by its content."""
        return self.config.settings | {"prepared": self.file.sha256 if self.file else None}

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that a report may give."""
        return self.config.labels

    @cached_property
    def file(self) -> PreparedFile | None:
        """The prepared reports, read when first asked for: by the planning process only."""
        return None if self.prepared is None else PreparedFile(self.prepared, self.secret)

    @cached_property
    def _pipeline(self) -> Pipeline:
        return Pipeline(self.config, self.secret)

    def __getstate__(self) -> dict[str, Any]:  # the index of a prepared file stays behind
        return {"secret": self.secret, "config": self.config, "prepared": self.prepared}

    def check_joins(self, items: Sequence[tuple[str, str, Place | None]]) -> None:
        """Raises ConfigError where prepared reports fit nothing of the plan, or have other labels.

        `items`: study, patient and place of the prepared report of each planned study.
        """
        if self.prepared is None:
            return
        joined = [(study, patient, place) for study, patient, place in items if place is not None]
        if not joined:
            raise ConfigError(
                f"--reports structured {self.prepared}: none of its studies is in --input; prepare the reports with "
                "the same --key-file, and a column --study that holds what names the study here"
            )
        tried = joined[:JOINS_TRIED]
        if all(self._joined(*one) == Failed(study=one[0], cause=OTHER_PATIENT) for one in tried):
            raise ConfigError(
                f"--reports structured {self.prepared}: the first {len(tried)} of its studies belong to other patients "
                "here; prepare the reports with a column --patient that holds what names the patient here"
            )
        if self.file is not None and (other := sorted(self.file.labels - set(self.labels))):
            raise ConfigError(
                f"--labels {self.config.ontology}: the reports of {self.prepared} were prepared with others, such as "
                f"{other[0]}; give the --labels that prepare_reports.py had"
            )

    def check_sections(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a section that the pipeline does not know."""
        unknown = sorted(set(names) - {WHOLE, *SECTION_NAMES})
        if unknown:
            raise ConfigError(
                f"--reports structured: no section is called {unknown[0]!r}; there is {WHOLE} (all of it), "
                f"{', '.join(SECTION_NAMES)}"
            )

    def complete(
        self, record: StudyRecord, texts: Mapping[str, Cell], known: KnownPatient | None, place: Place | None
    ) -> tuple[StudyRecord, str | None, Counter[str]]:
        """(record with what its report gave, why it gave nothing, what was counted: `Pipeline.each`).

        Never raises for data, never lets raw text through. Labels that the record has already stay.
        """
        counts: Counter[str] = Counter()
        if self.prepared is not None:
            result = self._joined(record.study, record.patient, place)
        elif texts:
            raw = RawReport(study=record.study, patient=record.patient, texts=texts, known=known)
            (result,), counts = self._pipeline.prepare([raw])
        else:
            return record, None, counts
        if isinstance(result, Failed):
            return record, f"report: {result.cause}", counts
        members = record.model_dump() | result.members()
        members["labels"] = {**result.labels, **record.labels}
        members["provenance"] = {**record.provenance, "extractor": result.extractor}
        if record.deidentifier is not None:
            members["deidentifier"] = f"{record.deidentifier}; text: {result.deidentifier}"
        return StudyRecord.model_validate(members), None, counts

    def _joined(self, study: str, patient: str, place: Place | None) -> PreparedReport | Failed:
        cause = "changed since the start"
        if self.prepared is None or place is None:
            return Failed(study=study, cause="not among the prepared ones")
        try:
            report = PreparedReport.from_line(PreparedFile.read(self.prepared, place), self.secret)
        except (DataError, OSError):
            return Failed(study=study, cause=cause)
        if report.study != study:
            return Failed(study=study, cause=cause)
        if report.patient != patient:
            return Failed(study=study, cause=OTHER_PATIENT)
        return report
