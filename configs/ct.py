"""Runs on CT volumes with their reports."""

from __future__ import annotations

from dataclasses import replace

from configs import prompts
from configs.schema import EvaluationConfig, TrainConfig
from core.checkpoint import CheckpointConfig
from core.engine import EngineConfig
from core.models.anatomy_pool import AnatomyPool
from core.models.text import bert_base, text_tiny
from core.models.volume import vit_b_volume, vit_tiny_volume
from core.optim import OptimConfig
from core.tasks.fvlm import FVLM
from core.tasks.supervised import Supervised
from core.tasks.volume_clip import VolumeCLIP
from core.trainer import TrainerConfig
from shards.decode_volume import VolumeDecoder
from shards.ingest.phantom_ct_text import LABELS as PHANTOM_LABELS
from shards.ingest.phantom_ct_text import ORGANS as PHANTOM_ORGANS
from shards.loader import Loader
from shards.reports.lexicon.anatomy import ANATOMIES

# fVLM's corpus: 64,476 patients to train on, 20 epochs of batch 48 (fvlm.md 4 and 5.3; batches are multiples of 48).
EPOCH_STEPS = 64_476 // 48


def fvlm_b() -> TrainConfig:
    """fVLM with ViT-B on 112 x 256 x 352 voxels and BERT-base, 36 anatomies, batch 48: for GPUs.

    Meant to start from a 2D MAE (`init.vision`, inflated) and a clinical BERT (`init.text`).
    """
    return TrainConfig(
        global_batch_size=48,
        task=FVLM.Config(
            vision=vit_b_volume(), text=bert_base(), anatomies=tuple(ANATOMIES), soft_ramp_steps=2 * EPOCH_STEPS
        ),
        data=Loader.Config(volume=VolumeDecoder.Config(anatomies=tuple(ANATOMIES)), text_length=128),
        optim=OptimConfig(
            learning_rate=1e-4, betas=(0.9, 0.999), weight_decay=0.05, warmup_steps=EPOCH_STEPS, final_factor=0.01
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16", micro_batch=4, activation_checkpointing=True),
        trainer=TrainerConfig(
            steps=20 * EPOCH_STEPS, log_every=20, evaluate_every=1000, save_every=1000, picture_every=5000
        ),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=10_000),
        evaluation=EvaluationConfig(
            protocols=("anatomy",),
            prompts=prompts.CT_RATE_PROMPTS,
            anatomy_of=prompts.CT_RATE_ANATOMY,
            paraphrases=prompts.paraphrased(prompts.CT_RATE_ANATOMY),
        ),
    )


def clip_b() -> TrainConfig:
    """CLIP on whole volumes and whole reports, with the towers, data and schedule of fvlm_b."""
    base = fvlm_b()
    task = VolumeCLIP.Config(vision=vit_b_volume(), text=bert_base(), embed_dim=256)
    return _whole_reports(base, task, text_length=384)


def supervised_b() -> TrainConfig:
    """The encoder of fvlm_b taught by labels alone: CT-RATE's 18."""
    return _labels_alone(fvlm_b(), Supervised.Config(vision=vit_b_volume(), labels=18))


def fvlm_tiny() -> TrainConfig:
    """fVLM with towers of about a million weights on phantoms of 48 x 64 x 64 voxels: learns on two CPU cores."""
    windows_hu = ((-1000.0, -600.0), (-150.0, 250.0), (200.0, 1000.0))  # lung, soft tissue, bone and calcification
    vision = replace(vit_tiny_volume(), channels=len(windows_hu), stem=(16, 64), depth=1, levels=(1,))
    volume = VolumeDecoder.Config(
        size=vision.volume_size,
        patch_size=vision.fine_size,
        windows_hu=windows_hu,
        anatomies=PHANTOM_ORGANS,
    )
    return TrainConfig(
        global_batch_size=48,
        task=FVLM.Config(
            vision=vision,
            text=replace(text_tiny(), max_length=256),
            anatomies=PHANTOM_ORGANS,
            pool=AnatomyPool.Config(weighting="share"),
            embed_dim=128,
            soft_ramp_steps=100,
        ),
        data=Loader.Config(volume=volume, text_length=64),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_steps=30),
        engine=EngineConfig(zero_stage=2, precision="bf16"),
        trainer=TrainerConfig(steps=400, log_every=20, evaluate_every=200, save_every=200, picture_every=None),
        evaluation=EvaluationConfig(
            protocols=("anatomy",),
            prompts=prompts.CT_PHANTOM_PROMPTS,
            anatomy_of=prompts.CT_PHANTOM_ANATOMY,
            paraphrases=prompts.paraphrased(prompts.CT_PHANTOM_ANATOMY),
        ),
    )


def clip_tiny() -> TrainConfig:
    """CLIP on whole phantoms and their whole reports, with the towers and schedule of fvlm_tiny."""
    base = fvlm_tiny()
    task = VolumeCLIP.Config(vision=base.task.vision, text=base.task.text, embed_dim=base.task.embed_dim)
    return _whole_reports(base, task, text_length=256)


def supervised_tiny() -> TrainConfig:
    """The encoder of fvlm_tiny taught by the phantom's labels."""
    base = fvlm_tiny()
    return _labels_alone(base, Supervised.Config(vision=base.task.vision, labels=len(PHANTOM_LABELS)))


def _whole_reports(base: TrainConfig, task: VolumeCLIP.Config, *, text_length: int) -> TrainConfig:
    evaluation = replace(base.evaluation, protocols=("zero_shot", "retrieval"))
    return replace(base, task=task, data=replace(base.data, text_length=text_length), evaluation=evaluation)


def _labels_alone(base: TrainConfig, task: Supervised.Config) -> TrainConfig:
    return replace(base, task=task, evaluation=replace(base.evaluation, protocols=("supervised",)))
