"""The same runs in seconds on CPU: for tests, and to see every part move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from configs import bone, chest
from configs.schema import TrainConfig
from core.checkpoint import CheckpointConfig
from core.models.contrast import GaussianContrast
from core.models.fusion import Fusion
from core.models.gaussian import GaussianEncoder
from core.models.masked_image import DecoderConfig
from core.models.prompts import PromptBank
from core.models.text import TextEncoder, text_tiny
from core.models.vision import VisionEncoder, vit_tiny
from core.tasks.dmlm import Weights
from shards.loader import Loader


def _shrunk(config: TrainConfig) -> TrainConfig:
    vision: VisionEncoder.Config = replace(vit_tiny(), image_size=32, width=32, depth=2, heads=2)
    text: TextEncoder.Config = replace(text_tiny(), max_length=64, width=32, depth=1, heads=2)
    return _short(config, replace(config.task, vision=vision, text=text, embed_dim=16), config.data)


def _short(config: TrainConfig, task: Any, data: Loader.Config) -> TrainConfig:
    """A few steps of a task that takes images of 32 px."""
    return replace(
        config,
        global_batch_size=12,
        task=task,
        data=replace(
            data,
            decode=replace(data.decode, image_size=32),
            text_length=48,
            lanes=12,
            buffer_bytes=1 << 28,
            fetch_threads=2,
        ),
        optim=replace(config.optim, warmup_steps=2),
        engine=replace(config.engine, precision="fp32"),
        trainer=replace(config.trainer, steps=6, log_every=1, evaluate_every=None, save_every=3, picture_every=None),
        checkpoint=CheckpointConfig(keep_last=2),
    )


def clip() -> TrainConfig:
    """chest:clip_tiny, smaller still: six steps of batch 12 at 32 px."""
    return _shrunk(chest.clip_tiny())


def siglip() -> TrainConfig:
    """chest:siglip_tiny, smaller still."""
    return _shrunk(chest.siglip_tiny())


def dmlm() -> TrainConfig:
    """chest:dmlm_tiny, smaller still, with every part in its first form (W2, consistency)."""
    shrunk = _shrunk(chest.dmlm_tiny())
    fusion = Fusion.Config(width=16, depth=1, heads=2)
    task = replace(
        shrunk.task,
        contrast=GaussianContrast.Config(),
        embedding=GaussianEncoder.Config(heads=2),
        fusion=fusion,
        kl="consistency",
        kl_at="both",
        match_group=4,
        weights=Weights(),
    )
    return replace(shrunk, task=task)


def umcl() -> TrainConfig:
    """chest:umcl_tiny, smaller still, with a negative bank."""
    shrunk = _shrunk(chest.umcl_tiny())
    bank = PromptBank.Config(length=4)
    return replace(shrunk, task=replace(shrunk.task, bank=bank, negative_bank=True, class_weight=0.1))


def align() -> TrainConfig:
    """bone:align_tiny, smaller still."""
    return _shrunk(bone.align_tiny())


def ecamp() -> TrainConfig:
    """chest:ecamp_tiny, smaller still: 16 patches of 4 px, twice that for super-resolution."""
    base = chest.ecamp_tiny()
    task = replace(
        base.task,
        vision=replace(base.task.vision, image_size=16, patch_size=4, width=32, depth=2, heads=2),
        text=replace(base.task.text, max_length=64, width=32, depth=1, heads=2),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
    )
    data = replace(
        base.data,
        masking=replace(base.data.masking, patch_size=8),
        entity_masking=replace(base.data.entity_masking, distilled_tokens=24),
    )
    return _short(base, task, data)
