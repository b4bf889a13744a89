"""What a disease is and how it shows, before any patient: the tables of structured reports.

Definition and appearance depend on the disease alone; no entry says on which side or in which lobe one patient has it.
The first eight are the phantom's: their words are in packed phantoms and do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BodyPart = Literal["chest", "abdomen", "bone"]


@dataclass(frozen=True, kw_only=True)
class Disease:
    """What is known of a disease before any patient: `name` in words, with its article in `one`, and its body part."""

    name: str
    one: str
    definition: str
    appearance: str
    part: BodyPart = "chest"


DISEASES: dict[str, Disease] = {
    "atelectasis": Disease(
        name="atelectasis", one="atelectasis",
        definition="Atelectasis is lung that has lost its air and shrunk.",
        appearance="It shows as a dense line or band, most often at the lung bases, with a raised hemidiaphragm or a"
        " shift of fissures and mediastinum towards it.",
    ),
    "cardiomegaly": Disease(
        name="cardiomegaly", one="cardiomegaly",
        definition="Cardiomegaly is a heart that is larger than normal.",
        appearance="The cardiac silhouette is wider than half of the thorax; look at both heart borders above the "
        "diaphragm.",
    ),
    "consolidation": Disease(
        name="consolidation", one="consolidation",
        definition="Consolidation is lung whose air spaces are filled with fluid, pus or cells.",
        appearance="It shows as a cloudy white area with blurred borders in any lung zone, which hides vessels and "
        "may hold air-filled bronchi.",
    ),
    "edema": Disease(
        name="pulmonary edema", one="pulmonary edema",
        definition="Pulmonary edema is fluid that has leaked from the vessels into the tissue and air of the lungs.",
        appearance="It shows as haze around both hila, blurred vessels and short horizontal lines at the lower chest"
        " wall.",
    ),
    "effusion": Disease(
        name="pleural effusion", one="a pleural effusion",
        definition="A pleural effusion is fluid between the lung and the chest wall.",
        appearance="It blunts the costophrenic angle; larger ones hide the hemidiaphragm and end in a curve that "
        "rises along the chest wall.",
    ),
    "hernia": Disease(
        name="hiatal hernia", one="a hiatal hernia",
        definition="A hiatal hernia is a part of the stomach that has slipped through the diaphragm into the chest.",
        appearance="It shows as a round shadow behind the heart, often with an air-fluid level.",
    ),
    "nodule": Disease(
        name="pulmonary nodule", one="a pulmonary nodule",
        definition="A pulmonary nodule is a rounded lesion of the lung of at most three centimetres.",
        appearance="It shows as a round white spot with a visible border in any lung zone; compare both sides so as "
        "not to take a nipple for one.",
    ),
    "pneumothorax": Disease(
        name="pneumothorax", one="a pneumothorax",
        definition="A pneumothorax is free air between the lung and the chest wall.",
        appearance="It shows as a thin white pleural line, most often at the apex, with no lung markings beyond it.",
    ),
    "pneumonia": Disease(
        name="pneumonia", one="pneumonia",
        definition="Pneumonia is an infection of the lung that fills its air spaces with inflammatory fluid.",
        appearance="It shows as a segmental, lobar or patchy opacity with blurred borders, often with air-filled "
        "bronchi inside it; look behind the heart and below the domes of the diaphragm.",
    ),
    "mass": Disease(
        name="pulmonary mass", one="a pulmonary mass",
        definition="A pulmonary mass is a lesion of the lung of more than three centimetres, which counts as cancer "
        "until proven otherwise.",
        appearance="It shows as a large dense shadow with smooth, lobed or spiculated borders, which may hold a "
        "cavity or reach the pleura.",
    ),
    "opacity": Disease(
        name="lung opacity", one="a lung opacity",
        definition="A lung opacity is any area of the lung that lets fewer rays through than it should.",
        appearance="It shows as an area whiter than the lung around it, of any shape and border; compare the same "
        "zone of both lungs.",
    ),
    "ground_glass_opacity": Disease(
        name="ground-glass opacity", one="ground-glass opacity",
        definition="Ground-glass opacity is lung that is partly filled or thickened, so that it is hazy but not solid.",
        appearance="On CT it shows as a grey veil through which vessels and bronchial walls stay visible; on "
        "radiographs it is a faint haze.",
    ),
    "emphysema": Disease(
        name="emphysema", one="emphysema",
        definition="Emphysema is a lasting widening of the air spaces whose walls are destroyed.",
        appearance="On CT it shows as dark areas without walls, often worst in the upper zones, with bullae; on "
        "radiographs the lungs are large and dark with flat diaphragms.",
    ),
    "hyperinflation": Disease(
        name="hyperinflation", one="hyperinflation",
        definition="Hyperinflation is lung that holds more air than normal because it cannot be breathed out.",
        appearance="The diaphragms are low and flat, more ribs than usual lie above them, and the space behind the "
        "breastbone is wide and dark.",
    ),
    "fibrosis": Disease(
        name="pulmonary fibrosis", one="pulmonary fibrosis",
        definition="Pulmonary fibrosis is scar tissue in the lung, which becomes stiff and loses volume.",
        appearance="It shows as coarse lines and nets, often below the pleura and at the bases, with pulled bronchi "
        "and, late, small stacked cysts like a honeycomb.",
    ),
    "septal_thickening": Disease(
        name="interlobular septal thickening", one="interlobular septal thickening",
        definition="Interlobular septal thickening is fluid, cells or scar in the thin walls between the lobules of "
        "the lung.",
        appearance="It shows as fine lines that end at the pleura and outline small polygons, smooth in edema and "
        "beaded in tumour.",
    ),
    "mosaic_attenuation": Disease(
        name="mosaic attenuation", one="mosaic attenuation",
        definition="Mosaic attenuation is lung whose regions differ in density because air is trapped or blood flows"
        " unevenly.",
        appearance="On CT it shows as a patchwork of darker and lighter regions with sharp borders; in trapped air "
        "the dark ones stay dark on breathing out.",
    ),
    "bronchiectasis": Disease(
        name="bronchiectasis", one="bronchiectasis",
        definition="Bronchiectasis is a lasting widening of bronchi.",
        appearance="A bronchus is wider than the artery beside it, does not taper, or is seen close to the pleura; "
        "it looks like tram lines or like a signet ring.",
    ),
    "peribronchial_thickening": Disease(
        name="peribronchial thickening", one="peribronchial thickening",
        definition="Peribronchial thickening is swelling, fluid or inflammation of the walls of the bronchi and the "
        "tissue around them.",
        appearance="It shows as thick rings where bronchi are seen end-on and as thick parallel lines where they run"
        " in the plane, most often around the hila.",
    ),
    "cavity": Disease(
        name="pulmonary cavity", one="a pulmonary cavity",
        definition="A pulmonary cavity is a gas-filled hole within a nodule, a mass or a consolidation of the lung.",
        appearance="It shows as a dark centre within a white wall, thick or thin, and may hold an air-fluid level.",
    ),
    "tuberculosis": Disease(
        name="tuberculosis", one="tuberculosis",
        definition="Pulmonary tuberculosis is an infection of the lung by mycobacteria that destroys tissue and scars.",
        appearance="It shows as patchy opacities, cavities and small branching nodules, most often in the upper "
        "zones; healed disease leaves scars and calcified nodules.",
    ),
    "granuloma": Disease(
        name="granuloma", one="a granuloma",
        definition="A granuloma is a small focus of healed inflammation, which has often turned into chalk.",
        appearance="It shows as a small, sharp and very dense spot in the lung or in a hilar lymph node.",
    ),
    "pulmonary_embolism": Disease(
        name="pulmonary embolism", one="a pulmonary embolism",
        definition="A pulmonary embolism is a clot that blocks an artery of the lungs.",
        appearance="On CT with contrast it shows as a dark filling defect within a bright pulmonary artery; the "
        "heart's chamber before it may be wide.",
    ),
    "vascular_congestion": Disease(
        name="pulmonary vascular congestion", one="pulmonary vascular congestion",
        definition="Pulmonary vascular congestion is blood that backs up in the vessels of the lungs, mostly because"
        " the heart fails to pump it on.",
        appearance="The vessels of the upper zones are as wide as those of the lower ones or wider, and the hila are"
        " full and less sharp.",
    ),
    "pulmonary_artery_enlargement": Disease(
        name="enlargement of the pulmonary artery", one="enlargement of the pulmonary artery",
        definition="Enlargement of the pulmonary artery is a widening of its trunk, mostly from raised pressure in "
        "the lungs' vessels.",
        appearance="The trunk is wider than the ascending aorta beside it or bulges at the heart's border, and the "
        "branches taper quickly.",
    ),
    "pleural_thickening": Disease(
        name="pleural thickening", one="pleural thickening",
        definition="Pleural thickening is a scarred or otherwise thick lining of the lung and chest wall.",
        appearance="It shows as a smooth or lumpy white band along the inner chest wall or over the apex, which does"
        " not move with posture.",
    ),
    "pleural_plaque": Disease(
        name="pleural plaque", one="a pleural plaque",
        definition="A pleural plaque is a local, often calcified scar of the pleura, typical after exposure to "
        "asbestos.",
        appearance="It shows as a sharp, flat, dense patch along the ribs or on the dome of the diaphragm.",
    ),
    "pericardial_effusion": Disease(
        name="pericardial effusion", one="a pericardial effusion",
        definition="A pericardial effusion is fluid in the sac around the heart.",
        appearance="On CT it shows as a band of fluid around the heart; on radiographs the heart's shadow is large "
        "and shaped like a bottle.",
    ),
    "coronary_calcification": Disease(
        name="coronary artery calcification", one="coronary artery calcification",
        definition="Coronary artery calcification is chalk in the walls of the heart's arteries, a sign of "
        "atherosclerosis.",
        appearance="On CT it shows as bright dots and tracks along the grooves of the heart's surface.",
    ),
    "arterial_calcification": Disease(
        name="arterial wall calcification", one="arterial wall calcification",
        definition="Arterial wall calcification is chalk in the wall of the aorta or its branches, a sign of "
        "atherosclerosis.",
        appearance="It shows as thin bright lines or plaques along the outline of the vessel, on radiographs mostly "
        "at the arch.",
    ),
    "aortic_dilation": Disease(
        name="dilatation of the aorta", one="dilatation of the aorta",
        definition="Dilatation of the aorta is a segment that is wider than normal; beyond one and a half times its "
        "width it is an aneurysm.",
        appearance="The vessel's diameter is too large on cross sections; on radiographs its knob or border bulges "
        "and the mediastinum is wide.",
    ),
    "enlarged_cardiomediastinum": Disease(
        name="widened mediastinum", one="a widened mediastinum",
        definition="A widened mediastinum is a middle compartment of the chest that is broader than normal, from "
        "vessels, nodes, fat, blood or a tumour.",
        appearance="The shadow above the heart is broad, or its borders are lobed, blurred or displaced.",
    ),
    "lymphadenopathy": Disease(
        name="lymphadenopathy", one="lymphadenopathy",
        definition="Lymphadenopathy is enlargement of lymph nodes, by custom beyond one centimetre across the short "
        "axis.",
        appearance="On CT it shows as rounded soft-tissue nodules beside the trachea, below the carina or at the "
        "hila; on radiographs the hila or the stripe beside the trachea are thick and lobed.",
    ),
    "pneumomediastinum": Disease(
        name="pneumomediastinum", one="a pneumomediastinum",
        definition="A pneumomediastinum is free air in the middle compartment of the chest.",
        appearance="It shows as dark streaks that outline the heart, the great vessels and the trachea and may rise "
        "into the neck.",
    ),
    "subcutaneous_emphysema": Disease(
        name="subcutaneous emphysema", one="subcutaneous emphysema",
        definition="Subcutaneous emphysema is air in the soft tissue below the skin.",
        appearance="It shows as dark streaks and bubbles in the chest wall and neck, which part the fibres of the "
        "muscles.",
    ),
    "elevated_diaphragm": Disease(
        name="elevated hemidiaphragm", one="an elevated hemidiaphragm",
        definition="An elevated hemidiaphragm is a dome of the diaphragm that stands too high, from weakness, lost "
        "lung volume or pressure from below.",
        appearance="One dome stands clearly higher than the usual small difference, often with a band of collapsed "
        "lung above it.",
    ),
    "thyroid_enlargement": Disease(
        name="enlargement of the thyroid", one="enlargement of the thyroid",
        definition="Enlargement of the thyroid, a goitre, is a gland that is larger than normal, often with nodules.",
        appearance="It shows as a soft-tissue mass at the base of the neck that may push the trachea aside and reach"
        " behind the breastbone.",
    ),
    "hepatic_steatosis": Disease(
        name="hepatic steatosis", one="hepatic steatosis", part="abdomen",
        definition="Hepatic steatosis is fat stored in the cells of the liver.",
        appearance="On CT without contrast the liver is darker than the spleen and its vessels stand out against it.",
    ),
    "gallstone": Disease(
        name="gallstone", one="a gallstone", part="abdomen",
        definition="A gallstone is a solid body formed from bile within the gallbladder.",
        appearance="It shows as a dense or ringed spot in the lowest part of the gallbladder; many stones are not "
        "visible on CT.",
    ),
    "kidney_stone": Disease(
        name="kidney stone", one="a kidney stone", part="abdomen",
        definition="A kidney stone is a crystalline body in the collecting system of the kidney.",
        appearance="On CT without contrast it shows as a small very bright spot in a calyx, the renal pelvis or the "
        "ureter.",
    ),
    "renal_cyst": Disease(
        name="renal cyst", one="a renal cyst", part="abdomen",
        definition="A renal cyst is a thin-walled space filled with fluid in a kidney, mostly harmless.",
        appearance="On CT it shows as a round dark lesion of the density of water with a sharp border and no "
        "enhancement.",
    ),
    "hydronephrosis": Disease(
        name="hydronephrosis", one="hydronephrosis", part="abdomen",
        definition="Hydronephrosis is a collecting system of the kidney that is stretched because urine cannot drain.",
        appearance="The calyces and the renal pelvis are wide and filled with fluid; look along the ureter for the "
        "cause.",
    ),
    "ascites": Disease(
        name="ascites", one="ascites", part="abdomen",
        definition="Ascites is free fluid in the abdominal cavity.",
        appearance="It shows as fluid around the liver and the spleen, beside the colon and in the pelvis.",
    ),
    "fracture": Disease(
        name="fracture", one="a fracture", part="bone",
        definition="A fracture is a break in the continuity of a bone.",
        appearance="It shows as a dark line or a step in the cortex, with or without displacement of the fragments; "
        "impacted ones show as a dense band.",
    ),
    "dislocation": Disease(
        name="dislocation", one="a dislocation", part="bone",
        definition="A dislocation is a joint whose surfaces have lost contact with each other.",
        appearance="The articular surfaces no longer face each other on at least one of two perpendicular views.",
    ),
    "vertebral_compression": Disease(
        name="vertebral compression fracture", one="a vertebral compression fracture", part="bone",
        definition="A vertebral compression fracture is a vertebral body that has lost height, mostly from weak bone"
        " or a fall.",
        appearance="The body is wedged, sunken or flat compared with its neighbours, and its end plates are bent or "
        "dense.",
    ),
    "osteoarthritis": Disease(
        name="osteoarthritis", one="osteoarthritis", part="bone",
        definition="Osteoarthritis is wear of the cartilage of a joint, of the spine or the limbs, with new bone at "
        "its margins.",
        appearance="The joint or disc space is narrow, with bony spurs, dense bone below the surface and small cysts.",
    ),
    "osteopenia": Disease(
        name="osteopenia", one="osteopenia", part="bone",
        definition="Osteopenia is bone that holds less mineral than normal.",
        appearance="The bones are darker than usual, with thin cortices and few, coarse trabeculae.",
    ),
    "scoliosis": Disease(
        name="scoliosis", one="scoliosis", part="bone",
        definition="Scoliosis is a sideways curve of the spine with rotation of the vertebrae.",
        appearance="On a frontal view the row of vertebral bodies is curved, and their spinous processes leave the "
        "midline.",
    ),
    "kyphosis": Disease(
        name="kyphosis", one="kyphosis", part="bone",
        definition="Kyphosis is a forward bend of the spine that is stronger than normal.",
        appearance="On a side view the thoracic spine is strongly curved, and its vertebral bodies may be wedged.",
    ),
    "bone_lesion": Disease(
        name="bone lesion", one="a bone lesion", part="bone",
        definition="A bone lesion is a local change of bone, lytic where bone is lost and sclerotic where it is "
        "dense, which may be a metastasis.",
        appearance="It shows as a dark hole or a dense spot in the marrow space; look for a broken cortex, a blurred"
        " border and a mass beside it.",
    ),
    "joint_effusion": Disease(
        name="joint effusion", one="a joint effusion", part="bone",
        definition="A joint effusion is excess fluid within the capsule of a joint.",
        appearance="It shows as soft-tissue density that bulges the capsule and displaces the fat pads beside the "
        "joint.",
    ),
    "soft_tissue_swelling": Disease(
        name="soft-tissue swelling", one="soft-tissue swelling", part="bone",
        definition="Soft-tissue swelling is an increase in the thickness of skin, fat or muscle from fluid or blood.",
        appearance="The soft tissue beside the bone is thick and dense, and the dark planes of fat within it are "
        "blurred or displaced.",
    ),
}  # fmt: skip

# Concepts of the finding vocabulary that are another name for a disease of the table; the rest are called as there.
DISEASE_OF_CONCEPT = {
    "bronchial_wall_thickening": "peribronchial_thickening",
    "calcified_nodule": "granuloma",
    "hiatal_hernia": "hernia",
    "infiltrate": "opacity",
    "lytic_lesion": "bone_lesion",
    "nodular_opacity": "nodule",
    "pleural_effusion": "effusion",
    "pulmonary_edema": "edema",
    "sclerotic_lesion": "bone_lesion",
}
# Their words fit any organ: they count as the lung's only where the report speaks of the lung.
OF_THE_LUNG = frozenset({"cavity", "consolidation", "granuloma", "mass", "nodule", "opacity"})
# What every report on a body part looks for: absent where it says nothing of it.
LOOKED_FOR: dict[BodyPart, tuple[str, ...]] = {
    "chest": (
        "atelectasis", "cardiomegaly", "consolidation", "edema", "effusion", "mass", "nodule", "pneumonia",
        "pneumothorax",
    ),
    "abdomen": (),
    "bone": ("fracture", "dislocation"),
}  # fmt: skip
