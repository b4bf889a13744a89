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
    "Ordonnance du 12/03/2020. Traitement arrêté le 3 avril 2019.": "12/03/2020;3 avril 2019",
    "Amené par sa maman Sonia.": "Sonia",
    "Il habite Lille. Vu à Ottawa.": "Lille;Ottawa",
    "Monsieur le Docteur Kervadec, Mr l'interne Bilic": "Kervadec;Bilic",
    "Dr Delvaux, soins dentaires, tél. 06 12 11 22 33": "Delvaux;06 12 11 22 33",
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
Prénom : Sexe : M
Nom : Service : Cardiologie
Mère : migraine. Père : épilepsie. Papa au travail, Maman prévenue, Mamie garde la sœur.
Articles L. 1110-4 et R. 1131-1 à R. 1131-20 du Code de la santé publique, articles 313-1 à 313-3, 441-1 et suivants.
Loi n° 2011-814 du 7 juillet 2011, décret n°2013-1066 du 3 juin 2013, arrêté du 6 avril 2011 relatif au management.
Loi Informatique et Libertés n° 78-17 du 6 janvier 1978, règlement (UE) 2016/679.
Étude NCT03515837, EudraCT 2017-004188-11, ID-RCB 2018-A01234-51, ORPHA:45448, OMIM 254130.
Panel BRCA1, BRCA2, PALB2, RAD51C. NM_007294.4, rs80357906, 46,XY,inv(3)(q21q26), chr11:47364248, HLA DRB1*11:04.
Codes SNOMED : M-81403, T-92000. Nomenclature INAMI 442455-442466. Accréditation COFRAC n° 8-1234.
Dents absentes : 18 28 38 48 46 36. Bridge 21 22 23 24. Apgar 9/10/10.
Œsophagite de grade C de Los Angeles, muqueuse de Barrett C2M4 selon Prague, classe C de Pell et Gregory.
Oxford 1, Ottawa -, Genève révisé 2, critères de New York, recommandations de Paris et de Vienne.
Hernioplastie selon Lichtenstein. Critères FIGO 2018, recommandations ESC 2021.
INDUCTION : SUFENTANIL 15, PROPOFOL 180, ATRACURIUM 30, LEVOTHYROXINE.
Monsieur le Directeur, Madame la Secrétaire,
Sécurité sociale - Formulaire S6909
"""


@pytest.mark.parametrize(("text", "hidden"), HIDDEN.items())
def test_habits_of_letters(text: str, hidden: str) -> None:
    assert [text[one.start : one.end] for one in RULES.find(text)] == hidden.split(";")


def test_an_empty_field_takes_no_label_of_the_next_line_and_an_acronym_is_no_further_name() -> None:
    text = "Médecin traitant : Dr\nMutuelle : MGEN\nMr Deschanel, SDRA modéré. Dr Luc Bogaerts, INAMI inconnu."
    assert [text[one.start : one.end] for one in RULES.find(text)] == ["Deschanel", "Luc Bogaerts"]


@pytest.mark.parametrize("text", KEPT.strip().splitlines())
def test_prose_is_kept(text: str) -> None:
    assert [text[one.start : one.end] for one in RULES.find(text)] == []


def test_no_name_is_cut_where_a_long_document_is() -> None:
    name = "Anne-Sophie DE LA FONTAINE"
    for more in range(40):  # characters by which the name moves over the first cut, at 6,000
        before = "toux " * 1_190 + "x" * more + " Mme "
        spans = [(one.start, one.end) for one in RULES.find(f"{before}{name} {'toux ' * 1_200}", "fr")]
        assert spans == [(len(before), len(before) + len(name))]
