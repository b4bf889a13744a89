"""Forms in which hospital letters of France, Belgium, Switzerland, Canada and English reports write names."""

from __future__ import annotations

import re

import pytest

from tests.shards.reports.rules import RULES


def missed(text: str, names: str, language: str) -> list[str]:
    """The names, parted by ";", that are not wholly found at any place of the text."""
    covered = {place for one in RULES.find(text, language) for place in range(one.start, one.end)}
    return [
        name
        for name in names.split(";")
        if not any(
            all(place in covered for place in range(match.start(), match.end()) if text[place].isalnum())
            for match in re.finditer(re.escape(name), text)
        )
    ]


FORMS = {
    "initials": [
        ("J Smith reviewed the images.", "J Smith"), ("Reviewed by J Smith.", "J Smith"),
        ("Images reviewed with K Okafor.", "K Okafor"), ("IMAGES REVIEWED BY J SMITH.", "J SMITH"),
        ("JB Smith reviewed the films.", "JB Smith"), ("J.B. Smith reviewed", "J.B. Smith"),
        ("R Vandenbroucke a relu les images.", "R Vandenbroucke"), ("Relues avec P Quesnel.", "P Quesnel"),
        ("J-P Quesnel a opéré", "J-P Quesnel"), ("Pr. J.-P. Quesnel", "J.-P. Quesnel"), ("Dr Ch. MORVAN", "Ch. MORVAN"),
        ("Opérateur : PQ / Aide : Morvan E", "Morvan E"), ("Prescripteur : QUESNEL P.", "QUESNEL P."),
    ],
    "orders": [
        ("BRZEZINSKI Aldric", "BRZEZINSKI Aldric"), ("Aldric BRZEZINSKI", "Aldric BRZEZINSKI"),
        ("Brzezinski, Aldric", "Brzezinski, Aldric"), ("BRZEZINSKI, Aldric", "BRZEZINSKI, Aldric"),
        ("Okafor, Kwame J. seen in clinic", "Okafor, Kwame J."), ("Nom : KERVADEC Prénom : Annick", "KERVADEC;Annick"),
        ("Nom/Prénom: KERVADEC/ANNICK", "KERVADEC;ANNICK"), ("N° IPP 12345678 KERVADEC ANNICK F", "KERVADEC ANNICK"),
        ("Patient Name: OKAFOR^KWAME^^^MR", "OKAFOR;KWAME"), ("Zbrk Quvenzhane, M.D.", "Zbrk Quvenzhane"),
        ("seen by Okafor, MD", "Okafor"),
    ],
    "particles": [
        ("LE GOFF Yannick né le 3 mai 1950", "LE GOFF Yannick"), ("VAN DEN BOSSCHE Pieter", "VAN DEN BOSSCHE Pieter"),
        ("Pieter Van den Bossche", "Pieter Van den Bossche"), ("Solène d'Ormesson", "Solène d'Ormesson"),
        ("Dre Tremblay-Ouellet", "Tremblay-Ouellet"), ("SAINT-GELAIS Mathéo", "SAINT-GELAIS Mathéo"),
    ],
    "other surnames": [
        ("Mme KERVADEC ép. TROADEC", "KERVADEC;TROADEC"), ("Mme Troadec née Kervadec", "Troadec;Kervadec"),
        ("Madame Annick KERVADEC, épouse TROADEC, 45 ans", "Annick KERVADEC;TROADEC"),
        ("TROADEC NEE KERVADEC ANNICK", "TROADEC;KERVADEC ANNICK"), ("veuve LESCOP", "LESCOP"),
        ("Nom de naissance : KERVADEC", "KERVADEC"), ("Nom d'usage : TROADEC", "TROADEC"),
        ("Nom de jeune fille : kervadec", "kervadec"), ("Nom marital : Troadec", "Troadec"),
    ],
    "who wrote it": [
        ("Rédigé par : Gwenn Lescop", "Gwenn Lescop"), ("Validé par LESCOP", "LESCOP"),
        ("Compte rendu validé électroniquement par LESCOP", "LESCOP"), ("Saisi par Morvan Elodie", "Morvan Elodie"),
        ("Dicté par GL, relu par Quesnel", "Quesnel"), ("Demandeur : QUESNEL PIERRICK", "QUESNEL PIERRICK"),
        ("Electronically signed: K. OKAFOR, MD", "K. OKAFOR"), ("Signed: kwame okafor", "kwame okafor"),
    ],
    "the staff": [
        ("L'infirmière Bovy a posé la voie.", "Bovy"), ("Kiné : Abiola", "Abiola"), ("Sénior : Bacha", "Bacha"),
        ("Chirurgien : Dr Rey   Aide opératoire : Obi", "Rey;Obi"), ("Interne de garde : Lescop", "Lescop"),
        ("Vu avec Quesnel.", "Quesnel"), ("Dicté par de Dardel", "de Dardel"), ("Relu avec Lê Minh", "Lê Minh"),
        ("Examen de PERRIER Gilbert du 12/03/2018", "PERRIER Gilbert"), ("FORGET, Mathieu", "FORGET, Mathieu"),
        ("Kervadec consulte pour toux. Thorens revient demain.", "Thorens"), ("Dr NGUYỄN Đức", "NGUYỄN Đức"),
    ],
    "to whom it was told": [
        ("Findings were communicated to Lopes by phone.", "Lopes"), ("Transmis à Lescop.", "Lescop"),
        ("Findings discussed with Okafor.", "Okafor"), ("Pt Okafor c/o cough", "Okafor"),
        ("A Galvani reviewed the images.", "A Galvani"), ("Reviewed by O Noack.", "O Noack"),
        ("Mrs Iadanza was seen. Sanchez is the referring physician.", "Iadanza;Sanchez"), ("PALUSZAK T", "PALUSZAK T"),
    ],
    "lists and letter heads": [
        ("cc: Quesnel, Morvan", "Quesnel;Morvan"), ("Destinataires : P. Quesnel, E. Morvan", "P. Quesnel;E. Morvan"),
        ("Destinataires :\nQUESNEL Pierrick\nMORVAN Elodie", "QUESNEL Pierrick;MORVAN Elodie"),
        ("Docteurs Morvan, Quesnel et Lescop", "Morvan;Quesnel;Lescop"), ("Drs Morvan/Quesnel", "Morvan;Quesnel"),
        ("Drs MORVAN - QUESNEL - LESCOP", "MORVAN;QUESNEL;LESCOP"), ("Chef de service : Pr A. Morvan", "A. Morvan"),
        ("Praticiens hospitaliers\nElodie MORVAN\nPierrick QUESNEL", "Elodie MORVAN;Pierrick QUESNEL"),
    ],
    "signatures": [
        ("Bien confraternellement,\n\nElodie Morvan", "Elodie Morvan"), ("Confraternellement,\nMORVAN", "MORVAN"),
        ("Salutations distinguées.\nMorvan", "Morvan"), ("Sincerely,\nKwame Okafor", "Kwame Okafor"),
    ],
    "lower case and capitals": [
        ("mme kervadec annick vue ce jour", "kervadec annick"),
        ("vu par dr morvan et interne quesnel", "morvan;quesnel"),
        ("MME KERVADEC ANNICK VUE CE JOUR AU SCANNER", "KERVADEC ANNICK"),
        ("Patient : troadec annick", "troadec annick"),
        ("PATIENTE KERVADEC ANNICK, TOUX FEBRILE", "KERVADEC ANNICK"), ("Sa fille Gwenn est prévenue", "Gwenn"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("language", ["fr", "en"])
def test_forms_of_names(form: str, language: str) -> None:
    found = {text: missed(text, names, language) for text, names in FORMS[form]}
    assert {text: names for text, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "text",
    [
        "A Carpentier ring is seen. E Coli was found. Vitamin D Deficiency.",
        "Patients Discutés : aucun. Mère hypertendue. Femme de 45 ans.",
        "Validé par échographie. Vu par Doppler. Reviewed by CT.",
        "Cordialement,\nService de radiologie",
        "Née à terme. EP. Scanner thoracique. EP SEGMENTAIRE DROITE.",
        "Nom de la lésion : kyste",
        "Ceci est normal. L'ASP a montré des niveaux. A Galvani membrane.",
        "Kerley B. Hépatite C, grade B.",
    ],
)
def test_what_looks_like_a_form_of_a_name_is_kept(text: str) -> None:
    assert RULES.find(text, "fr") == ()
