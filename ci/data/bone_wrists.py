"""Counts of wrist studies from the metadata of GRAZPEDWRI-DX: what the bone phantom draws its wrists from.

`python -m ci.data.bone_wrists ../shared/data` writes the same file from the same source. The source is published under
CC BY 4.0: E. Nagy et al., "A pediatric wrist trauma X-ray dataset (GRAZPEDWRI-DX) for machine learning", Scientific
Data 9, 222 (2022), https://doi.org/10.1038/s41597-022-01328-z. Only numbers of studies are kept, nothing of a patient.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

TARGET = Path(__file__).parents[2] / "shards" / "ingest" / "phantom_bone_wrists.csv"
COLUMNS = ("age_years", "sex", "side", "fracture", "cast", "metal", "views", "studies")
ATTRIBUTION = (
    "# Studies of GRAZPEDWRI-DX (Nagy et al. 2022, doi 10.1038/s41597-022-01328-z, CC BY 4.0) by age, sex, side,",
    "# fracture, cast, metal and views; counted by ci/data/bone_wrists.py from dataset.csv. One of unknown sex is left",
    "# out, and one of no usual set of views counts as a pair.",
)
_VIEWS = {("1",): "AP", ("2",): "LATERAL", ("1", "3"): "AP OBLIQUE", ("2", "3"): "LATERAL OBLIQUE"}


def fracture_kind(views: Sequence[Mapping[str, str]]) -> str:
    """`none`, `torus`, `epiphyseal` or `complete`: what is seen in any view, by the study's AO paediatric codes."""
    if not any(view["fracture_visible"] for view in views):
        return "none"
    codes = views[0]["ao_classification"].split("; ")
    if any(code.startswith("23r-E") for code in codes):
        return "epiphyseal"
    return "torus" if any(code.endswith("-M/2.1") for code in codes) else "complete"


def count_studies(rows: Sequence[Mapping[str, str]]) -> Counter[tuple[str | int, ...]]:
    """(all of COLUMNS but the last) -> studies."""
    studies: dict[tuple[str, ...], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        studies[row["patient_id"], row["study_number"], row["laterality"]].append(row)
    counts: Counter[tuple[str | int, ...]] = Counter()
    for views in studies.values():
        first = views[0]
        if first["gender"] not in ("F", "M"):
            continue
        shown = _VIEWS.get(tuple(sorted({view["projection"] for view in views})), "AP LATERAL")
        counts[
            int(float(first["age"])), first["gender"], first["laterality"], fracture_kind(views),
            int(any(view["cast"] for view in views)), int(any(view["metal"] for view in views)), shown,
        ] += 1  # fmt: skip
    return counts


def main(folder: str) -> None:
    """Write the table from `folder`/grazpedwri_meta/dataset.csv."""
    with (Path(folder) / "grazpedwri_meta" / "dataset.csv").open(encoding="utf-8-sig", newline="") as file:
        counts = count_studies(list(csv.DictReader(file)))
    lines = [*ATTRIBUTION, ",".join(COLUMNS)]
    lines += [",".join(map(str, (*key, number))) for key, number in sorted(counts.items())]
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
