"""Letters around phantom reports: identities are planted and listed, and none of them is left by de-identification."""

from __future__ import annotations

from ci.data.bone_letters import Letter, write_letter
from shards.ingest.phantom_bone_scene import EASY, draw_scene
from shards.ingest.phantom_bone_text import write_report
from shards.reports.identity import Surrogates, deidentify
from tests.shards.reports.rules import RULES

COUNT = 45


def letters() -> list[tuple[Letter, dict[str, str]]]:
    made = []
    for index in range(COUNT):
        scene = draw_scene(3, 2 * index, EASY)  # patients all different
        sections = write_report(scene).sections
        made.append(
            (write_letter(sections, scene.habit, sex=scene.sex, age_years=scene.age_years, number=index), sections)
        )
    return made


def test_letters_hold_the_report_and_what_was_planted() -> None:
    made = letters()
    for letter, sections in made:
        assert all(text in letter.text for text in sections.values())
        assert len(letter.identifiers) >= 5
        assert all(written in letter.text for _, written in letter.identifiers)
        assert "name" not in repr(letter) and letter.known.last_names[0] not in repr(letter)
    assert {kind for letter, _ in made for kind, _ in letter.identifiers} == {
        "hospital", "phone", "caps", "first", "last", "birth", "id", "insurance", "date", "doctor", "address", "city",
        "old", "radiologist", "mail",
    }  # fmt: skip
    assert letters()[7] == made[7]
    assert len({letter.known.key for letter, _ in made}) == COUNT


def test_no_planted_identity_is_left_and_the_report_is_untouched() -> None:
    surrogates = Surrogates(secret=b"a secret of thirty-two bytes ....")
    left = []
    for letter, sections in letters():
        clean = deidentify(letter.text, "fr", RULES, surrogates, patient=letter.known).text
        for kind, written in letter.identifiers:
            # a town or a first name alone may be another person's surrogate: whole ones count
            if written in clean and kind not in ("city", "first"):
                left.append((kind, letter.text.index(written)))
        for name, text in sections.items():
            assert text in clean, f"{name} of a report was changed"
    assert left == []
