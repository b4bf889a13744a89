"""French sentences as reports have them (chest, CT, bone), written for these tests, with what they tell of."""

from __future__ import annotations

import pytest

from shards.reports.entities import entities

PRESENT, ABSENT, POSSIBLE = "present", "absent", "possible"

# Sentence -> (concept, status) or (concept, status, laterality) or with position; every mention, in any order.
SENTENCES: dict[str, list[tuple[str | None, ...]]] = {
    # ------------------------------------------------------------ chest radiograph
    "Pas d'épanchement pleural ni de pneumothorax.": [("pleural_effusion", ABSENT), ("pneumothorax", ABSENT)],
    "Ni épanchement ni pneumothorax.": [("pleural_effusion", ABSENT), ("pneumothorax", ABSENT)],
    "Absence d'épanchement pleural liquidien ou gazeux.": [("pleural_effusion", ABSENT)],
    "Épanchement pleural droit de moyenne abondance.": [("pleural_effusion", PRESENT, "right")],
    "Petit épanchement pleural gauche avec atélectasie passive de la base.": [
        ("pleural_effusion", PRESENT, "left"),
        ("atelectasis", PRESENT),
    ],
    "Épanchements pleuraux bilatéraux, prédominant à droite.": [("pleural_effusion", PRESENT, "bilateral")],
    "Foyer de condensation du lobe inférieur gauche.": [("consolidation", PRESENT, "left", "lower lobe")],
    "Opacité alvéolaire de la base droite évocatrice d'une pneumopathie.": [
        ("lung_opacity", PRESENT, "right", "base"),
        ("pneumonia", POSSIBLE),
    ],
    "Cardiomégalie modérée, sans signe d'œdème pulmonaire.": [("cardiomegaly", PRESENT), ("pulmonary_edema", ABSENT)],
    "La silhouette cardiaque est de taille normale.": [("cardiomegaly", ABSENT)],
    "Silhouette cardiaque augmentée de volume.": [("cardiomegaly", PRESENT)],
    "Index cardio-thoracique normal.": [("cardiomegaly", ABSENT)],
    "L'index cardio-thoracique est augmenté.": [("cardiomegaly", PRESENT)],
    "Pas de cardiomégalie.": [("cardiomegaly", ABSENT)],
    "Le médiastin n'est pas élargi.": [("enlarged_cardiomediastinum", ABSENT)],
    "Élargissement du médiastin supérieur.": [("enlarged_cardiomediastinum", PRESENT)],
    "Pneumothorax apical droit complet.": [("pneumothorax", PRESENT, "right", "apex")],
    "Le pneumothorax gauche a disparu.": [("pneumothorax", ABSENT, "left")],
    "Un pneumothorax minime ne peut être formellement éliminé.": [("pneumothorax", POSSIBLE)],
    "On ne peut éliminer un foyer infectieux débutant.": [("pneumonia", POSSIBLE)],
    "Pas d'opacité en faveur d'une pneumopathie et d'une masse.": [
        ("lung_opacity", ABSENT),
        ("pneumonia", ABSENT),
        ("mass", ABSENT),
    ],
    "Pas de fracture, et un petit épanchement articulaire.": [("fracture", ABSENT), ("joint_effusion", PRESENT)],
    "Pas de fracture et d'épanchement articulaire.": [("fracture", ABSENT), ("joint_effusion", ABSENT)],
    "Fracture à confirmer.": [("fracture", POSSIBLE)],
    "Pas d'anomalie à l'exception d'une fracture.": [("abnormality", ABSENT), ("fracture", PRESENT)],
    "Absence de lésion évocatrice de métastase et de fracture.": [
        ("abnormality", ABSENT),
        ("metastasis", ABSENT),
        ("fracture", ABSENT),
    ],
    "Pas de modification de l'épanchement pleural gauche.": [("pleural_effusion", PRESENT, "left")],
    "Sans changement notable de la cardiomégalie par rapport au cliché précédent.": [("cardiomegaly", PRESENT)],
    "Émoussement du cul-de-sac pleural gauche.": [("costophrenic_blunting", PRESENT, "left", "costophrenic angle")],
    "Les culs-de-sac pleuraux sont libres.": [("costophrenic_blunting", ABSENT)],
    "Comblement du cul-de-sac costo-diaphragmatique droit.": [("pleural_effusion", PRESENT, "right")],
    "Distension thoracique avec aplatissement des coupoles, en rapport avec une BPCO.": [
        ("hyperinflation", PRESENT),
        ("hyperinflation", PRESENT),
        ("copd", PRESENT),
    ],
    "Surélévation de la coupole diaphragmatique droite.": [("elevated_hemidiaphragm", PRESENT, "right")],
    "Syndrome interstitiel bilatéral prédominant aux bases.": [("interstitial_opacity", PRESENT, "bilateral", "base")],
    "Pas d'anomalie pleuro-parenchymateuse, hormis un nodule de l'apex gauche.": [
        ("abnormality", ABSENT),
        ("nodule", PRESENT, "left", "apex"),
    ],
    "Sonde d'intubation en place, son extrémité à 3 cm de la carène.": [("support_device", PRESENT)],
    "Le drain thoracique a été retiré.": [("support_device", ABSENT)],
    "PAS D'EPANCHEMENT PLEURAL. CARDIOMEGALIE.": [("pleural_effusion", ABSENT), ("cardiomegaly", PRESENT)],
    "Aucune image nodulaire décelable.": [("nodular_opacity", ABSENT)],
    "Séquelles fibreuses apicales bilatérales.": [("scarring", PRESENT, "bilateral", "apex")],
    "Hernie hiatale volumineuse.": [("hiatal_hernia", PRESENT)],
    "Aorte déroulée et calcifiée.": [("tortuous_aorta", PRESENT), ("calcification", PRESENT)],
    "Pas de foyer parenchymateux mais un épanchement pleural droit.": [
        ("abnormality", ABSENT),
        ("pleural_effusion", PRESENT, "right"),
    ],
    "Antécédent de pneumothorax.": [],
    # ------------------------------------------------------------ CT
    "Plages de verre dépoli sous-pleurales des deux lobes inférieurs.": [
        ("ground_glass_opacity", PRESENT, "bilateral", "pleura, lower lobe")
    ],
    "Absence d'embolie pulmonaire jusqu'aux artères sous-segmentaires.": [("pulmonary_embolism", ABSENT)],
    "Pas d'argument en faveur d'une embolie pulmonaire.": [("pulmonary_embolism", ABSENT)],
    "Emphysème centrolobulaire prédominant aux sommets.": [("emphysema", PRESENT, None, "apex")],
    "Dilatations des bronches cylindriques du lobe moyen.": [("bronchiectasis", PRESENT, "right", "middle lobe")],
    "Micronodule calcifié du lobe supérieur droit.": [("calcified_nodule", PRESENT, "right", "upper lobe")],
    "Masse tissulaire hilaire gauche avec adénopathies médiastinales.": [
        ("mass", PRESENT, "left", "hilum"),
        ("lymphadenopathy", PRESENT, None, "mediastinum"),
    ],
    "Pas d'adénopathie médiastinale, hilaire ou axillaire.": [("lymphadenopathy", ABSENT)],
    "Ganglions médiastinaux infracentimétriques.": [("lymph_node", PRESENT)],
    "Épaississement des septa interlobulaires et rayon de miel.": [
        ("septal_thickening", PRESENT),
        ("fibrosis", PRESENT),
    ],
    "Épanchement péricardique de faible abondance.": [("pericardial_effusion", PRESENT)],
    "Absence d'épanchement pleural ou péricardique.": [("pleural_effusion", ABSENT), ("pericardial_effusion", ABSENT)],
    "Calcifications coronaires et athérome de la crosse aortique.": [
        ("coronary_calcification", PRESENT),
        ("arterial_calcification", PRESENT),
    ],
    "Stéatose hépatique.": [("hepatic_steatosis", PRESENT)],
    "Aspect compatible avec une tuberculose.": [("tuberculosis", POSSIBLE)],
    "Nodule du lobe moyen (métastase ?).": [("nodule", PRESENT, "right", "middle lobe"), ("metastasis", POSSIBLE)],
    "Aspect en mosaïque du parenchyme, pouvant traduire une bronchiolite.": [
        ("mosaic_attenuation", PRESENT),
        ("bronchial_wall_thickening", POSSIBLE),
    ],
    # ------------------------------------------------------------ bone
    "Pas de fracture visible.": [("fracture", ABSENT)],
    "Pas de lésion osseuse traumatique.": [("fracture", ABSENT)],
    "Aucun trait de fracture n'est visible.": [("fracture", ABSENT)],
    "Fracture non déplacée de l'extrémité distale du radius gauche.": [("fracture", PRESENT, "left", "radius")],
    "Fracture du col fémoral droit, engrenée en valgus.": [("fracture", PRESENT, "right", "femur")],
    "Fracture de la malléole externe gauche sans diastasis.": [
        ("fracture", PRESENT, "left", "fibula"),
        ("malalignment", ABSENT),
    ],
    "Possible fissure du scaphoïde, à contrôler.": [("fracture", POSSIBLE, None, "wrist")],
    "Une fracture du scaphoïde ne peut être exclue.": [("fracture", POSSIBLE, None, "wrist")],
    "Gonarthrose fémoro-tibiale interne avec pincement de l'interligne et ostéophytes.": [
        ("degenerative_change", PRESENT, None, "knee"),
        ("joint_space_narrowing", PRESENT),
        ("osteophyte", PRESENT),
    ],
    "Interligne articulaire respecté.": [("joint_space_narrowing", ABSENT)],
    "Pas d'épanchement intra-articulaire du genou.": [("joint_effusion", ABSENT)],
    "Épanchement articulaire du coude droit.": [("joint_effusion", PRESENT, "right", "elbow")],
    "Luxation antérieure de l'épaule gauche.": [("dislocation", PRESENT, "left", "shoulder")],
    "Absence de luxation ou de fracture.": [("dislocation", ABSENT), ("fracture", ABSENT)],
    "Prothèse totale de hanche droite en place, sans signe de descellement.": [
        ("joint_prosthesis", PRESENT, "right"),
        ("prosthetic_loosening", ABSENT),
    ],
    "Matériel d'ostéosynthèse en place au niveau du tibia.": [("orthopedic_hardware", PRESENT, None, "tibia")],
    "Tassement vertébral de L1.": [("vertebral_compression", PRESENT)],
    "Hauteur des corps vertébraux conservée.": [("vertebral_compression", ABSENT)],
    "Pincement discal L4-L5 et L5-S1.": [("disc_space_narrowing", PRESENT)],
    "Scoliose dorso-lombaire à convexité droite.": [("scoliosis", PRESENT)],
    "Déminéralisation osseuse diffuse.": [("osteopenia", PRESENT)],
    "Pas de lésion lytique ni condensante.": [("lytic_lesion", ABSENT)],
    "Tuméfaction des parties molles en regard de la malléole interne.": [("soft_tissue_swelling", PRESENT)],
    "Cal osseux en cours de formation, pas de pseudarthrose.": [("fracture_healing", PRESENT), ("nonunion", ABSENT)],
    "Hallux valgus bilatéral.": [("hallux_valgus", PRESENT, "bilateral")],
    "Aspect évocateur d'une maladie de Paget du fémur droit.": [("paget_disease", POSSIBLE, "right", "femur")],
    "Calcifications de la coiffe des rotateurs à gauche.": [("soft_tissue_calcification", PRESENT, "left")],
    "Fractures des arcs postérieurs des 5e et 6e côtes gauches.": [("fracture", PRESENT, "left", "rib")],
}


def found(sentence: str) -> list[tuple[str | None, ...]]:
    return [
        (entity.concept, entity.status, entity.laterality, entity.position)
        for entity in entities(sentence, [(0, len(sentence))], "fr")
    ]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_french_sentence(sentence: str) -> None:
    told, expected = found(sentence), SENTENCES[sentence]
    assert len(told) == len(expected), told
    rest = list(told)
    for wanted in expected:
        match = next((entity for entity in rest if entity[: len(wanted)] == wanted), None)
        assert match is not None, (wanted, told)
        rest.remove(match)


@pytest.mark.parametrize("sentence", ["Pas d'épanchement pleural ni de pneumothorax.", "Fracture du tibia droit."])
def test_capitals_and_missing_accents_change_nothing(sentence: str) -> None:
    plain = sentence.upper().replace("É", "E").replace("Â", "A")
    assert found(plain) == found(sentence)
