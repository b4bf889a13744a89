"""Runs on chest radiographs with their reports."""

from __future__ import annotations

from dataclasses import replace

from configs.schema import EvaluationConfig, TrainConfig
from core.checkpoint import CheckpointConfig
from core.engine import EngineConfig
from core.models.contrast import GaussianContrast
from core.models.fusion import Fusion
from core.models.gaussian import GaussianEncoder
from core.models.masked_image import DecoderConfig
from core.models.prompts import PromptBank
from core.models.text import TextEncoder, bert_base, text_tiny
from core.models.vision import vit_b16, vit_tiny
from core.optim import OptimConfig
from core.tasks.clip import CLIP
from core.tasks.dmlm import DMLM, Weights
from core.tasks.ecamp import ECAMP
from core.tasks.mae import MAE
from core.tasks.siglip import SigLIP
from core.tasks.umcl import UMCL
from core.trainer import TrainerConfig
from shards.decode import Decoder
from shards.ingest.phantom_chest_text import LABELS as PHANTOM_LABELS
from shards.label_union import NO_FINDING, THORAX, class_of
from shards.loader import Loader
from shards.transforms import augment, entity_masking, label_text, masking, report_sentences


def clip_b16() -> TrainConfig:
    """CLIP with ViT-B/16 at 224 px and BERT-base, batch 768: for GPUs."""
    return TrainConfig(
        global_batch_size=768,
        task=CLIP.Config(vision=vit_b16(), text=bert_base()),
        data=Loader.Config(decode=Decoder.Config(image_size=224), text_length=128),
        optim=OptimConfig(learning_rate=5e-4, weight_decay=0.2, warmup_steps=2000),
        engine=EngineConfig(zero_stage=1, precision="bf16"),
        trainer=TrainerConfig(steps=50_000, log_every=20, evaluate_every=1000, save_every=1000, picture_every=5000),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=10_000),
    )


def siglip_b16() -> TrainConfig:
    """SigLIP with the towers of clip_b16."""
    base = clip_b16()
    optim = replace(base.optim, betas=(0.9, 0.95), weight_decay=1e-4, multipliers={"logit_bias": 10.0})
    return replace(base, task=SigLIP.Config(vision=vit_b16(), text=bert_base()), optim=optim)


def clip_tiny() -> TrainConfig:
    """CLIP with towers of under a million weights at 64 px, batch 96: learns from phantoms on two CPU cores."""
    return TrainConfig(
        global_batch_size=96,
        task=CLIP.Config(vision=vit_tiny(), text=text_tiny(), embed_dim=128),
        data=Loader.Config(decode=Decoder.Config(image_size=64), text_length=96),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, warmup_steps=50),
        engine=EngineConfig(zero_stage=2, precision="bf16"),
        trainer=TrainerConfig(steps=1000, log_every=20, evaluate_every=250, save_every=250, picture_every=250),
    )


def siglip_tiny() -> TrainConfig:
    """SigLIP with the towers of clip_tiny."""
    base = clip_tiny()
    # At 1e-3 Adam moves the bias by at most 1 in 1,000 steps: ten times faster lets it find its place.
    optim = replace(base.optim, multipliers={"logit_bias": 10.0})
    return replace(base, task=SigLIP.Config(vision=vit_tiny(), text=text_tiny(), embed_dim=128), optim=optim)


def dmlm_b16() -> TrainConfig:
    """D-MLM with ViT-B/16 at 224 px and BERT-base on structured reports, batch 1024: for GPUs.

    Meant to start from pre-trained towers (`init.vision`, `init.text`): new modules learn five times as fast as they.
    """
    return TrainConfig(
        global_batch_size=1024,
        task=DMLM.Config(vision=vit_b16(), text=bert_base()),
        data=Loader.Config(
            decode=Decoder.Config(image_size=224),
            text_length=256,
            report="structured",
            lanes=64,
            masking=masking.Config(patch_size=16),
        ),
        optim=OptimConfig(
            learning_rate=5e-5,
            weight_decay=0.01,
            warmup_steps=1500,
            multipliers={"fused": 5.0, "image_": 5.0, "text_": 5.0, "word_mask_token": 5.0, "contrast": 5.0},
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", micro_batch=32),
        trainer=TrainerConfig(steps=30_000, log_every=20, evaluate_every=1000, save_every=1000, picture_every=5000),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=10_000),
        evaluation=EvaluationConfig(protocols=("zero_shot", "retrieval", "uncertainty")),
    )


def dmlm_tiny() -> TrainConfig:
    """D-MLM with the towers of clip_tiny and one narrow pair of fusion layers, on raw reports.

    Means learn from CLIP's contrast; variances forecast what it costs, and hold masked views around full ones. Masked
    prediction weighs a tenth, since at this size and length of training it takes from the contrast. Without matching
    and with the divergence of embeddings alone: the other passes would cost a step of clip_tiny more.
    """
    base = clip_tiny()
    task = DMLM.Config(
        vision=vit_tiny(),
        text=text_tiny(),
        embed_dim=128,
        contrast=GaussianContrast.Config(similarity="cosine", scale_init=1 / 0.07, scale_max=100.0),
        embedding=GaussianEncoder.Config(heads=2),
        fusion=Fusion.Config(width=64, depth=1, heads=2),
        fused=GaussianEncoder.Config(heads=2, logvar_init=0.0),
        kl="inclusion",
        kl_at="embedding",
        match_group=8,  # divides the share of 1, 2, 3, 4, 6 and 12 ranks
        weights=Weights(mlm=0.1, mim=0.1, itm=0.0, kl=0.3),
    )
    data = replace(base.data, masking=masking.Config(patch_size=8))
    return replace(base, task=task, data=data, evaluation=dmlm_b16().evaluation)


def umcl_b16() -> TrainConfig:
    """UMCL with ViT-B/16 at 224 px and BERT-base, batch 1024 of reports, labels and both: for GPUs.

    Meant to start from pre-trained towers (`init.vision`, `init.text`). `data.train` is a mixture: 60 % of a batch from
    sets with reports, 20 % from sets with labels, 20 % from sets with both teach best where reports are to be read.
    """
    classes = tuple(THORAX)
    return TrainConfig(
        global_batch_size=1024,
        task=UMCL.Config(vision=vit_b16(), text=bert_base(), classes=classes),
        data=Loader.Config(
            decode=Decoder.Config(image_size=224),
            text_length=128,
            lanes=64,
            label_text=label_text.Config(classes=classes),
            sentences=report_sentences.Config(shuffle=True, drop=0.2),
        ),
        optim=OptimConfig(
            learning_rate=1e-4,
            epsilon=1e-6,
            weight_decay=0.1,
            warmup_steps=1000,
            final_factor=0.01,
            multipliers={
                "towers.text.": 0.2,
                "towers.vision_projection": 5.0,
                "towers.text_projection": 5.0,
                "logit_scale": 5.0,
                "context_tokens": 20.0,
            },
            layer_decay={"towers.vision": 0.75},
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", micro_batch=64),
        trainer=TrainerConfig(steps=30_000, log_every=20, evaluate_every=1000, save_every=1000, picture_every=5000),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=10_000),
    )


def umcl_tiny() -> TrainConfig:
    """UMCL with the towers of clip_tiny, for the findings of phantoms.

    Four vectors around a name rather than sixteen: the text tower's mean over tokens drowns a name of two words.
    """
    base = clip_tiny()
    classes = (NO_FINDING, *(name for label in PHANTOM_LABELS if (name := class_of(label)) is not None))
    return replace(
        base,
        task=UMCL.Config(
            vision=vit_tiny(), text=text_tiny(), embed_dim=128, classes=classes, bank=PromptBank.Config(length=4)
        ),
        data=replace(base.data, label_text=label_text.Config(classes=classes)),
        optim=replace(base.optim, multipliers={"context_tokens": 2.0}),
    )


def ecamp_b16() -> TrainConfig:
    """ECAMP with ViT-B/16 at 224 px from images of 448 px and six text layers, batch 8192: for GPUs.

    Meant to start from an MAE's encoder (`init.vision`).
    """
    return TrainConfig(
        global_batch_size=8192,
        task=ECAMP.Config(
            vision=replace(vit_b16(), positions="sincos"),
            text=TextEncoder.Config(max_length=256, depth=6, heads=6, mlp_ratio=2.0),
        ),
        data=Loader.Config(
            decode=Decoder.Config(image_size=448, mean=0.4721, std=0.3037),
            text_length=256,
            lanes=64,
            masking=masking.Config(patch_size=32, patch_mask_ratio=0.75),
            augment=augment.Config(crop_area_fraction=(0.2, 1.0)),
        ),
        optim=OptimConfig(learning_rate=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=1000),
        engine=EngineConfig(zero_stage=1, precision="bf16", micro_batch=64),
        # 120 epochs of 200,000 studies.
        trainer=TrainerConfig(steps=3000, log_every=20, evaluate_every=250, save_every=250, picture_every=None),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=1000),
        evaluation=EvaluationConfig(protocols=()),
    )


def ecamp_tiny() -> TrainConfig:
    """ECAMP with the encoder of clip_tiny at 64 px from images of 128 px: learns from phantoms on two CPU cores."""
    base = clip_tiny()
    task = ECAMP.Config(
        vision=replace(vit_tiny(), positions="sincos"),
        text=replace(text_tiny(), max_length=160, norm="post", pool="cls", mlp_ratio=2.0, norm_epsilon=1e-12),
        decoder=DecoderConfig(width=64, depth=2, heads=4),
    )
    data = replace(
        base.data,
        decode=Decoder.Config(image_size=128),
        text_length=160,
        masking=masking.Config(patch_size=16, patch_mask_ratio=0.75),
    )
    optim = replace(base.optim, betas=(0.9, 0.95), weight_decay=0.05)
    return replace(base, task=task, data=data, optim=optim, evaluation=EvaluationConfig(protocols=()))


def mae_tiny() -> TrainConfig:
    """MAE with the image part of ecamp_tiny at 64 px: ECAMP without reports and without super-resolution."""
    base = ecamp_tiny()
    data = replace(base.data, decode=Decoder.Config(image_size=64), masking=replace(base.data.masking, patch_size=8))
    return replace(base, task=MAE.Config(vision=base.task.vision, decoder=base.task.decoder), data=data)


def mrm_tiny() -> TrainConfig:
    """ecamp_tiny as MRM has it: half of all words masked alike, none added, none weighed, the image as its mean."""
    base = ecamp_tiny()
    uniform = entity_masking.Config(masking="uniform", uniform=0.5, distilled=0.0, rebalance=False)
    return replace(base, task=replace(base.task, fusion="coarse"), data=replace(base.data, entity_masking=uniform))
