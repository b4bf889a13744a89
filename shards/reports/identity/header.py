"""Which DICOM attributes may pass, and how: values of closed lists, numbers, keyed hashes; everything else is dropped.

The readers of `shards.ingest` build records from this policy instead of cleaning headers: an attribute that is not in
`PASSES` cannot leave, whatever a vendor wrote into it. `tests/shards/reports/test_header.py` holds them to it.
"""

from __future__ import annotations

from typing import Literal

MODALITIES = (
    "AR", "BI", "BMD", "CR", "CT", "DG", "DR", "DX", "ECG", "EPS", "ES", "GM", "HC", "IO", "IVOCT", "IVUS", "KO", "LS",
    "MG", "MR", "NM", "OCT", "OP", "OT", "PR", "PT", "PX", "REG", "RF", "RG", "RTDOSE", "RTIMAGE", "RTPLAN", "RTSTRUCT",
    "RWV", "SC", "SEG", "SM", "SR", "TG", "US", "XA", "XC",
)  # fmt: skip
VIEWS = {
    "PA": "PA", "AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "LAT": "LATERAL", "LATERAL": "LATERAL", "LLD": "LLD",
    "RLD": "RLD", "LLO": "LLO", "RLO": "RLO", "LAO": "LAO", "RAO": "RAO", "LPO": "LPO", "RPO": "RPO",
}  # fmt: skip
BODY_PARTS = frozenset((
    "ABDOMEN", "ANKLE", "ARM", "BREAST", "CALCANEUS", "CHEST", "CLAVICLE", "COCCYX", "CSPINE", "ELBOW", "EXTREMITY",
    "FEMUR", "FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HIP", "HUMERUS", "JAW", "KNEE", "LEG", "LSPINE", "NECK",
    "PELVIS", "RIB", "SCAPULA", "SHOULDER", "SKULL", "SPINE", "SSPINE", "STERNUM", "TIBIA", "TOE", "TSPINE", "WRIST",
))  # fmt: skip
OLDEST_AGE_YEARS = 90.0  # higher ages point at persons
_AGE_UNITS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}

Passage = Literal["closed list", "number", "keyed hash", "picture", "check"]
# Attribute -> how it passes. "picture": needed to decode, order or turn pixels, not kept as text. "check": read only to
# refuse a file, or to find what belongs to it. Private elements, dates, comments, names, institutions
# and devices have no entry.
PASSES: dict[str, Passage] = {
    **dict.fromkeys(("PatientSex", "BodyPartExamined", "ImageLaterality", "Laterality", "ViewPosition"), "closed list"),
    **dict.fromkeys(("Modality", "LossyImageCompression"), "closed list"),
    **dict.fromkeys(("PatientAge", "Rows", "Columns", "BitsStored", "WindowCenter", "WindowWidth"), "number"),
    **dict.fromkeys(("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"), "number"),
    **dict.fromkeys(("PatientID", "StudyInstanceUID", "SOPInstanceUID"), "keyed hash"),
    **dict.fromkeys(
        (
            "ContourData",
            "ContourGeometricType",
            "LUTData",
            "ImageOrientationPatient",
            "ImagePositionPatient",
            "LUTDescriptor",
            "ModalityLUTSequence",
            "PatientOrientation",
            "PixelData",
            "PixelPaddingRangeLimit",
            "PixelPaddingValue",
            "PixelRepresentation",
            "RescaleIntercept",
            "RescaleSlope",
            "VOILUTFunction",
            "VOILUTSequence",
        ),
        "picture",
    ),
    **dict.fromkeys(
        (
            "BurnedInAnnotation",
            "ImageType",
            "InstanceNumber",
            "MaximumFractionalValue",
            "MediaStorageSOPClassUID",
            "NumberOfFrames",
            "PhotometricInterpretation",
            "PresentationIntentType",
            "RescaleType",
            "SOPClassUID",
            "SeriesInstanceUID",
            "SeriesNumber",
            "TransferSyntaxUID",
        ),
        "check",
    ),
    # Of SEG and RTSTRUCT objects: names find their anatomy, references their slices.
    **dict.fromkeys(
        (
            "CodeMeaning",
            "CodeValue",
            "CodingSchemeDesignator",
            "ContourSequence",
            "DerivationImageSequence",
            "FrameOfReferenceUID",
            "PerFrameFunctionalGroupsSequence",
            "PixelMeasuresSequence",
            "PlaneOrientationSequence",
            "PlanePositionSequence",
            "ROIContourSequence",
            "ROIName",
            "ROINumber",
            "RTReferencedSeriesSequence",
            "RTReferencedStudySequence",
            "ReferencedFrameOfReferenceSequence",
            "ReferencedFrameOfReferenceUID",
            "ReferencedROINumber",
            "ReferencedSOPInstanceUID",
            "ReferencedSegmentNumber",
            "ReferencedSeriesSequence",
            "SegmentIdentificationSequence",
            "SegmentLabel",
            "SegmentNumber",
            "SegmentSequence",
            "SegmentationType",
            "SegmentedPropertyCategoryCodeSequence",
            "SegmentedPropertyTypeCodeSequence",
            "SharedFunctionalGroupsSequence",
            "SliceThickness",
            "SourceImageSequence",
            "SpacingBetweenSlices",
            "StructureSetROISequence",
        ),
        "check",
    ),
}

# Attribute -> what it is. Read into memory only, so that a report's text can be searched for it.
SEARCHED: dict[str, Literal["person", "birth date", "id"]] = {
    **dict.fromkeys(("PatientName", "OtherPatientNames", "ReferringPhysicianName", "RequestingPhysician"), "person"),
    **dict.fromkeys(("PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName"), "person"),
    "PatientBirthDate": "birth date",
    **dict.fromkeys(("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "StudyInstanceUID"), "id"),
}

# Attribute -> what it is. Read into memory only, so that a report is matched with its study.
MATCHED: dict[str, Literal["date", "id"]] = {
    **dict.fromkeys(("StudyDate", "PatientBirthDate"), "date"), "AccessionNumber": "id",
}  # fmt: skip


def sex_of(written: str) -> Literal["F", "M", "O"] | None:
    """Patient's Sex, or None for anything that is not one of its three codes."""
    sexes: dict[str, Literal["F", "M", "O"]] = {"F": "F", "M": "M", "O": "O"}
    return sexes.get(written.upper())


def age_years_of(written: str) -> float | None:
    """Patient's Age ("045Y", "018M") in years; higher ages read 90, since they point at persons."""
    age = written.upper()
    number, unit = (age[:-1], age[-1:]) if age[-1:] in _AGE_UNITS else (age, "Y")
    if not (number.isascii() and number.isdigit() and len(number) <= 3):
        return None
    return min(OLDEST_AGE_YEARS, round(int(number) * _AGE_UNITS[unit], 2))
