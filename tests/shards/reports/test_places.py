"""Addresses, codes, towns, hospitals and numbers as letters of France, Belgium, Switzerland and Canada write them."""

from __future__ import annotations

import sys

import pytest

from tests.shards.reports.rules import RULES

HIDDEN = """
Domicilié ^12 bis, rue des Lilas^, ^25000^ ^Besançon^.
Adresse : ^3 ter av. du Général de Gaulle^ ^69003^ ^LYON^
^14 imp. des Cerisiers^/^38100^ ^Grenoble^
^5 all. des Roses^/^33000^ ^Bordeaux^
^8 chem. du Moulin^ ^1204^ ^Genève^
^2 pl. de la République^, ^67000^ ^Strasbourg^
^1 sq. Rapp^ ^68000^ ^COLMAR^
^RES LES TILLEULS BAT B^/^12 RUE PASTEUR^/^59000^ ^LILLE^
^Rés. Les Acacias, bât. C, appt 12^/^3 rue Pasteur^/^59000^ ^Lille^
^ZA des Grands Champs^ ^39100^ ^DOLE^
^Z.I. Nord^, ^BP 123^, ^25200^ ^Montbéliard^ Cedex
^CS 40111^/^35033^ ^RENNES CEDEX 9^
^Rue de la Loi 16^, ^1000^ ^Bruxelles^
^Rue de la Station 45 bte 3^, B-^5000^ ^Namur^
^Chemin des Fleurs 4^, CH-^1007^ ^Lausanne^
^Place du Marché 7^/^4000^ ^Liège^
^1250, rue Sherbrooke Ouest, app. 4^, ^Montréal^ (Québec) ^H3G 1H1^
^lieu-dit Le Moulin Neuf^, ^24100^ ^Bergerac^
Habite ^rue des lilas^, ^25000^ ^Besançon^.
^12 à 14 rue des Lilas, bât A, esc 3^/^25000^ ^Besançon^
^l2 rue des Lilas^ ^25000^ ^Besançon^
^Les Granges^/^25000^ ^Besançon^
Le centre de dialyse ^Diaverum^, la maison de retraite ^Les Lilas^, Institut ^Curie^.
Service de cardiologie, ^Lariboisière^, hôp. ^Cochin^, ^CHUV^.
Né à ^Ivrysurbois^ (^75013^), tél ^01,42,26,14,96^, visite ^8776 5390 54^, venue ^123456^.
Le quartier parisien de ^Ménilmontant^.
Habite ^17 grande rue^ à ^Dole^.
^22 r. Victor Hugo^ ^75016^ ^Paris^
^18 rond-point des Champs^ ^75008^ ^PARIS^
^12 Vieux Marronniers^/^29000^ ^Quimper^
Vient de F-^25000^ ^Besançon^.
^Hövelring 58^/^66872^ ^Lüdenscheid^
^Calle de Jacinto Plaza 827 Puerta 5^/^Girona^, ^29230^
Transféré de l'HIA ^Percy^, puis ^SSR La Beline^.
Suivi à l'^Hôtel-Dieu^ puis au ^CUSM^, ^Pavillon Leriche^.
Analyse du laboratoire ^Cerba^, Hop. ^Lariboisière^, Fondation ^Rothschild^.
Mail : ^jean.martin@chu.fr^, ^Centre hospitalier Prince William^ – source.
Secrétariat : ^O3 81 66 8l 66^, portable ^06-12-34-56-78^.
Tél : ^02/555.12.12^, GSM ^0476/12.34.56^, ^+41 (0)22 372 33 11^, ^514-890-8000^, poste ^12345^
IPP : ^0012345678^, N° IPP:^A123456^, NDA ^23001234^, N° d'examen : ^4567891^, Dossier: ^AB1234^
RAMQ : ^TREM 8503 1512^, NISS ^85.07.30-033.28^, Demande n°^1234567^, Épisode ^3456789^
"""
KEPT = [
    "Examen réalisé à l'hôpital, transfert au centre hospitalier ce jour, fondation solide du plateau.",
    "Hospitalisé en clinique puis au laboratoire de biologie médicale ; cabinet dentaire ; centre de référence.",
    "Place du scanner, cours évolutif, passage du produit, rang élevé, lotissement osseux, voie d'abord.",
    "12 passages de contraste, 3 allées et venues, 12 cours de kinésithérapie, 2 places, 4 quais.",
    "5EME COTE DROITE. LES POUMONS SONT CLAIRS. 2 R LUNG FIELDS ARE CLEAR, 3 ALL VIEWS, 4 LOT OF AIR.",
    "BP 120/80, pouls 72, BP 130, CS 3, TSA normaux, angle de 12 à 15, coupe 7 SQ normale.",
    "Nodule mobile, indolore, de 30/20 cm, à bords nets, à 2 tours de spire ; score d'Oxford, liquide de Bouin.",
    "Centre de Santé Mentale, Clinique Multidisciplinaire : l'insecte se fraie un chemin sous sa peau.",
    "Tour de taille normal, résidence seule, villa moyenne, parc de respirateurs, bâtiment sain.",
]


@pytest.mark.parametrize("marked", HIDDEN.strip().splitlines())
def test_places_and_numbers_are_found(marked: str) -> None:
    pieces = marked.replace("/^", "\n^").split("^")
    text = "".join(pieces)
    covered = {p for one in RULES.find(text, "fr") for p in range(one.start, one.end)}
    position = 0
    for index, piece in enumerate(pieces):
        wanted = [p for p in range(position, position + len(piece)) if text[p].isalnum()]
        assert index % 2 == 0 or covered.issuperset(wanted), piece
        position += len(piece)


@pytest.mark.parametrize("text", KEPT)
def test_words_of_reports_are_no_places(text: str) -> None:
    assert [text[one.start : one.end] for one in RULES.find(text, "fr")] == []


def test_work_of_all_rules_grows_with_the_length() -> None:
    line = "Vu par le Dr Jean DUPONT, 12 rue des Lilas 25000 Besançon, le 12/03/2019 à l'hôpital Cochin. IPP 1234567\n"
    calls = []
    for lines in (200, 400):
        count = 0

        def counted(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            RULES.find(line * lines, "fr")
        finally:
            sys.setprofile(None)
        calls.append(count)
    assert calls[1] < 2.2 * calls[0]
