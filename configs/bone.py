"""Runs on bone radiographs with French reports: studies of several views."""

from __future__ import annotations

from dataclasses import replace

from configs import prompts
from configs.schema import EvaluationConfig, TrainConfig
from core.checkpoint import CheckpointConfig
from core.engine import EngineConfig
from core.models.masked_image import DecoderConfig
from core.models.text import text_tiny, xlm_roberta_base
from core.models.vision import VisionEncoder, vit_b16, vit_tiny
from core.optim import OptimConfig
from core.tasks.mae import MAE
from core.tasks.study_align import StudyAlign, Synonyms
from core.tasks.supervised_images import SupervisedImages
from core.trainer import TrainerConfig
from shards.decode import Decoder
from shards.ingest.phantom_bone_scene import LABELS as PHANTOM_LABELS
from shards.loader import Loader
from shards.transforms import augment, masking

PATCHES_A_SIDE = 14  # at every resolution: larger images get larger patches (bone_xray_french.md, 3)

# Names that French reports use for one thing, English ones beside them: for the text encoder to draw together.
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("ulna", "cubitus"),
    ("fibula", "péroné"),
    ("patella", "rotule"),
    ("scapula", "omoplate"),
    ("talus", "astragale"),
    ("calcanéus", "calcanéum", "calcaneus"),
    ("scaphoïde", "os scaphoïde", "scaphoid bone"),
    ("fracture en motte de beurre", "fracture sous-périostée", "fracture torus", "torus fracture", "buckle fracture"),
    ("fracture en bois vert", "greenstick fracture"),
    ("décollement épiphysaire", "fracture de Salter-Harris", "épiphysiolyse traumatique", "physeal fracture"),
    ("gonarthrose", "arthrose du genou", "arthrose fémoro-tibiale", "knee osteoarthritis"),
    ("coxarthrose", "arthrose de la hanche", "hip osteoarthritis"),
    ("rhizarthrose", "arthrose trapézo-métacarpienne", "thumb base osteoarthritis"),
    ("pincement de l'interligne", "pincement articulaire", "joint space narrowing"),
    ("ostéophyte", "bec ostéophytique", "osteophyte", "bone spur"),
    ("sclérose sous-chondrale", "condensation sous-chondrale", "subchondral sclerosis"),
    ("géode", "kyste osseux", "lésion lacunaire", "bone cyst"),
    ("genu varum", "jambes arquées", "morphotype en varus", "bow legs"),
    ("genu valgum", "genoux en X", "morphotype en valgus", "knock knees"),
    ("cartilage de croissance", "cartilage de conjugaison", "physe", "growth plate"),
    ("âge osseux", "maturation osseuse", "bone age"),
    ("broche de Kirschner", "broche", "K-wire"),
    ("plaque vissée", "plaque et vis", "plate and screws"),
    ("enclouage centromédullaire", "clou centromédullaire", "intramedullary nail"),
    ("prothèse totale de genou", "PTG", "arthroplastie totale du genou", "total knee replacement"),
    ("plâtre", "gypse", "immobilisation plâtrée", "cast"),
    ("luxation", "déboîtement", "dislocation"),
    ("ostéoporose", "déminéralisation osseuse", "osteoporosis"),
    ("épanchement articulaire", "hydarthrose", "joint effusion"),
)


def _asked() -> EvaluationConfig:
    """Prompts name limb and bone, of which a study shows one: the nearest count."""
    return EvaluationConfig(prompts=prompts.BONE_PHANTOM_PROMPTS, prompt_temperature=0.05)


def align_b16() -> TrainConfig:
    """Studies aligned with French reports, ViT-B/16 at 224 px and XLM-RoBERTa, batch 768: for GPUs.

    Meant to start from pre-trained towers: `init.vision` a ViT-B/16, `init.text` and `data.tokenizer` a folder of
    XLM-RoBERTa, of its SapBERT, or of a French one of the same shape (DrBERT, CamemBERT). Multilingual ones and those
    taught synonyms serve better than French ones (bone_xray_french.md, 3).
    """
    return _at_resolution(224)


def align_b16_336() -> TrainConfig:
    """bone:align_b16 at 336 px with patches of 24 px, whose weights are resized from those of 16."""
    return _at_resolution(336)


def align_b16_448() -> TrainConfig:
    """bone:align_b16 at 448 px with patches of 32 px, whose weights are resized from those of 16."""
    return _at_resolution(448)


def _at_resolution(pixels: int) -> TrainConfig:
    return TrainConfig(
        global_batch_size=768,
        task=StudyAlign.Config(
            vision=replace(vit_b16(), image_size=pixels, patch_size=pixels // PATCHES_A_SIDE), text=xlm_roberta_base()
        ),
        data=Loader.Config(
            decode=Decoder.Config(image_size=pixels, fit="pad"),
            text_length=256,
            sampling="all_views",
            max_views=4,
            # No mirror images anywhere in the loader: the report names the side.
            augment=augment.Config(rotation_degrees=20.0, brightness_fraction=0.2, contrast_fraction=0.2),
        ),
        optim=OptimConfig(
            learning_rate=5e-5,
            weight_decay=0.01,
            warmup_steps=500,
            multipliers={"view_pool": 5.0, "vision_projection": 5.0, "text_projection": 5.0, "logit_": 5.0},
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", micro_batch=32),
        # 50 epochs of 219,675 pairs.
        trainer=TrainerConfig(steps=14_300, log_every=20, evaluate_every=500, save_every=500, picture_every=5000),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=5000),
        evaluation=_asked(),
    )


def _tiny_vision() -> VisionEncoder.Config:
    """Convolutions and the strongest patch, since a fracture is a pixel or two wide and a few long."""
    return replace(vit_tiny(), stem=(32, 64, 128), depth=1, pool="max")


def align_tiny() -> TrainConfig:
    """Studies aligned with French reports by towers of under a million weights at 64 px: learns on two CPU cores."""
    return TrainConfig(
        global_batch_size=96,
        task=StudyAlign.Config(vision=_tiny_vision(), text=text_tiny(), embed_dim=128),
        data=Loader.Config(
            decode=Decoder.Config(image_size=64),
            text_length=96,
            sampling="all_views",
            max_views=3,
            # What tells most is a pixel or two wide, and turning and cropping blur it.
            augment=augment.Config(crop_area_fraction=(1.0, 1.0), crop_aspect_ratio=1.0, rotation_degrees=0.0),
        ),
        optim=OptimConfig(learning_rate=2e-3, weight_decay=0.1, warmup_steps=50),
        engine=EngineConfig(zero_stage=2, precision="bf16"),
        trainer=TrainerConfig(steps=1000, log_every=20, evaluate_every=250, save_every=250, picture_every=250),
        evaluation=_asked(),
    )


def align_sigmoid_tiny() -> TrainConfig:
    """bone:align_tiny with the pairwise sigmoid in place of InfoNCE."""
    base = align_tiny()
    task = replace(base.task, loss="sigmoid", scale_init=10.0, scale_max=200.0)
    return replace(base, task=task, optim=replace(base.optim, multipliers={"logit_bias": 10.0}))


def align_synonyms_tiny() -> TrainConfig:
    """bone:align_tiny whose text encoder draws French and English names of one thing together, too."""
    base = align_tiny()
    return replace(base, task=replace(base.task, synonyms=Synonyms(groups=SYNONYMS)))


def align_one_view_tiny() -> TrainConfig:
    """bone:align_tiny on one view of each study, another one each epoch: what pooling has to beat."""
    base = align_tiny()
    return replace(base, data=replace(base.data, sampling="one_view"))


def supervised_tiny() -> TrainConfig:
    """The image encoder of bone:align_tiny taught by the phantom's labels alone."""
    base = align_tiny()
    task = SupervisedImages.Config(vision=base.task.vision, labels=len(PHANTOM_LABELS))
    return replace(base, task=task, evaluation=EvaluationConfig(protocols=("supervised",)))


def mae_tiny() -> TrainConfig:
    """The image encoder of bone:align_tiny taught to fill in masked images."""
    base = align_tiny()
    task = MAE.Config(
        # Filling in teaches every patch and the strongest none: it is judged by their mean, as its authors do.
        vision=replace(base.task.vision, positions="sincos", pool="mean"),
        decoder=DecoderConfig(width=64, depth=2, heads=4),
    )
    data = replace(base.data, masking=masking.Config(patch_size=8, patch_mask_ratio=0.75))
    optim = replace(base.optim, betas=(0.9, 0.95), weight_decay=0.05)
    return replace(base, task=task, data=data, optim=optim, evaluation=EvaluationConfig(protocols=()))
