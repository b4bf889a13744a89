"""Habits of hospitals' letters: who wrote, short ages, ranges, glued and foreign names; prose that looks like them."""

from __future__ import annotations

import pytest

from tests.shards.reports.rules import RULES

HIDDEN = {
    "cc: A. Nguyen MD; B.K. Patel, DO; Okonkwo": "A. Nguyen;B.K. Patel;Okonkwo",
    "Findings discussed with NP Kowalczyk.": "Kowalczyk",
    "Dictated by jsmith12 today.": "jsmith12",
    "User: kjones on the workstation": "kjones",
    "Saisi par mleroy, validé par kervadec.": "mleroy;kervadec",
    "Identifiant de connexion : jdupont75.": "jdupont75",
    "91F with cough. 90 M s/p fall. Tc 99m with SPECT.": "91;90",
    "Vu entre le 3 et le 5 mai 2020.": "3 et le 5 mai 2020",
    "mr oladipo was seen by dr van der merwe": "oladipo;van der merwe",
    "DUPONTJean a chuté, JeanMOREL aussi. IRMGenou, RachisIRM.": "DUPONTJean;JeanMOREL",
    "Cliniques universitaires Saint-Luc (Woluwe)": "Cliniques universitaires Saint-Luc;Woluwe",
    "12 rue Foch. Le patient va bien.": "12 rue Foch",
    "14 av. du Gal. Leclerc, 5 rue St. Pierre": "14 av. du Gal. Leclerc;5 rue St. Pierre",
    "LYON, le 6 juin 2019": "LYON;6 juin 2019",
    "Consultation du 12-03. Bilan du 6/10.": "12-03;6/10",
    "12-03 : revu en consultation.": "12-03",
    "Suivi par le Pr PA Sorensen at Mt. Sinai.": "PA Sorensen;Mt. Sinai",
    "Dr Le Coz, 45, drève des Charmes": "Le Coz;45, drève des Charmes",
    "Bonjour Kervadec, merci.": "Kervadec",
    "Prénoms : Honorine, Blanche\n": "Honorine;Blanche",
    "Dossier 2019-884512 reçu.": "2019-884512",
    "https://www.ch-valmont.fr/consultations": "https://www.ch-valmont.fr/consultations",
    "https://www.example.org/p/123": "https://www.example.org/p/123",
}
KEPT = """
Pneumonia is not likely in the first place. Clinical correlation advised.
Two lines in second place. Follow-up in 3 months.
Salter-Harris II fracture. von Hippel-Lindau. Fractures de Lisfranc, Chopart, Rolando.
Validé par échographie. Reviewed with contrast. Adressée par covid19.
Hémorragie sous-arachnoïdienne, Fisher 4, Fazekas 2, Garden IV, Borg 17/20, Child-Pugh A5, Spetzler-Martin 2.
Suivi d'une maladie de Paget et d'un syndrome de Di George, figure de Rey, anastomose de Van Velthoven.
Coloration de May-Grünwald-Giemsa. Irradiation par TrueBeam, masque BiPAP.
Le dr de garde est prévenu. Formulaire cerfa n° 15695. Variant c.1521_1523del.
Chère Consœur, poste 00 00 00 00 00, code (0000), dossier 1111111111.
Imprimé en France. Voir https://www.cnil.fr/plaintes et www.has-sante.fr.
RÉUNION DE CONCERTATION PLURIDISCIPLINAIRE - Sénologie
"""


@pytest.mark.parametrize(("text", "hidden"), HIDDEN.items())
def test_habits_of_letters(text: str, hidden: str) -> None:
    assert [text[one.start : one.end] for one in RULES.find(text)] == hidden.split(";")


@pytest.mark.parametrize("text", KEPT.strip().splitlines())
def test_prose_is_kept(text: str) -> None:
    assert [text[one.start : one.end] for one in RULES.find(text)] == []


def test_no_name_is_cut_where_a_long_document_is() -> None:
    name = "Anne-Sophie DE LA FONTAINE"
    for more in range(40):  # characters by which the name moves over the first cut, at 6,000
        before = "toux " * 1_190 + "x" * more + " Mme "
        spans = [(one.start, one.end) for one in RULES.find(f"{before}{name} {'toux ' * 1_200}", "fr")]
        assert spans == [(len(before), len(before) + len(name))]
