"""What a run will need, on paper: memory of a GPU, cores that feed it, bytes from the store and between GPUs, hours.

    python launchers/plan.py --recipe chest:clip_b16 --nodes 4
    python launchers/plan.py --recipe chest:dmlm_b16 --nodes 2 --gpu A100-40 --studies 227835 --epochs 30

Every line shows its formula. A study's memory and arithmetic are counted on one forward pass of the recipe's own task
on this CPU (seconds); what is assumed is marked and has an option.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from configs import schema
from configs.schema import TrainConfig
from core import cost
from core.engine import checkpoint_activations
from core.metrics import PEAK_FLOPS
from core.models import attention
from launchers.command import errors_in_one_line
from shards.batch import Batch
from shards.dataset import read_manifest
from shards.decode_volume import VolumeDecoder
from shards.errors import ConfigError
from shards.order import lanes_of_rank
from shards.tar_index import CHUNK_BYTES

GPU_GB = {"H200": 141, "H100": 80, "A100-80": 80, "A100-40": 40, "B200": 192, "L40S": 48, "L4": 24, "V100": 32}
BUCKETS_BYTES = 2 * 50_000_000 * 4  # DeepSpeed's buckets to reduce and to gather, of fp32 (core.engine)
ABNORMAL_SHARE = 0.1  # of the anatomies of a CT, assumed
# CPU time of a study in the loader, as measured on two cores of a Xeon in the cloud.
VOLUME_MS, VOLUME_VOXELS = 102.0, 112 * 256 * 352  # ci.bench ct_loader: a volume cut to so many voxels, no label maps
IMAGE_MS = 2 * 1000 / 588  # ci.bench loader: two threads, 512-px grey JPEG to 224 px
HOURS_A_MONTH = 730.0
CORES = 96  # of a node with eight GPUs, assumed
GB = 1e9


class Line(NamedTuple):
    """One row of the plan. `value` in `unit`; `formula` with the numbers that it was computed from."""

    name: str
    value: float
    unit: str
    formula: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """Machines and data of a plan. `utilisation`: share of the GPU's bf16 peak that a step reaches, assumed."""

    nodes: int
    gpus: int  # a node
    gpu: str
    network_gbit: float  # a node, to others and to the store
    utilisation: float
    study_bytes: float
    studies: int | None
    epochs: float | None
    price: float | None  # of a GPU for an hour
    price_gb_month: float | None = None
    price_million_reads: float | None = None
    price_gb_read: float | None = None
    cores: float = CORES  # a node
    loader_ms: float | None = None  # CPU time of a study in the loader; None: from the benchmark

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@errors_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    config = schema.apply_overrides(schema.load_recipe(arguments.recipe), arguments.overrides)
    site = _site(arguments, config)
    _check_ranks(config, site)
    lines = plan(config, site, counted(config))
    _show(arguments.recipe, site, lines)
    if arguments.json:
        rows = {line.name: {"value": line.value, "unit": line.unit, "formula": line.formula} for line in lines}
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--recipe", required=True, metavar="FIELD:RUN", help="as for pretrain.py, which lists them")
    add("--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change it")
    add("--nodes", type=int, default=1)
    add("--gpus", type=int, default=8, help="of a node (8)")
    add("--gpu", choices=sorted(GPU_GB), default="H100")
    add("--network-gbit", type=float, default=400.0, help="of a node, Gbit/s (assumed: 400)")
    add("--utilisation", type=float, default=0.35, help="share of the bf16 peak that a step reaches (assumed: 0.35)")
    add("--cores", type=float, default=CORES, help=f"of a node, for its loaders (assumed: {CORES})")
    add("--loader-ms", type=float, help="CPU time of a study in the loader (default: as ci.bench measured, scaled)")
    add("--data", metavar="MANIFEST", help="read sizes from here; default: data.train of the recipe, if it is set")
    add("--study-bytes", type=float, help="bytes read a study, where no manifest tells; unknown: no store lines")
    add("--studies", type=int, help="in an epoch, where there is no manifest")
    add("--epochs", type=float, help="instead of the recipe's trainer.steps")
    add("--price-per-gpu-hour", "--price", dest="price", type=float, help="in your currency, as all prices")
    add("--price-per-gb-month", type=float, help="of the store, for the set and the run's checkpoints, while it runs")
    add("--price-per-million-reads", type=float, help="requests of the store; a chunk of 2 MB is one")
    add("--price-per-gb-read", type=float, help="bytes that leave the store, if they cost")
    add("--json", metavar="FILE", help="write the lines there, too")
    return result


def _site(arguments: argparse.Namespace, config: TrainConfig) -> Site:
    """Raises ConfigError naming the option."""
    for name in (
        "nodes", "gpus", "network_gbit", "cores", "loader_ms", "epochs", "studies", "study_bytes", "price",
        "price_per_gb_month", "price_per_million_reads", "price_per_gb_read",
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if not 0 < arguments.utilisation <= 1:
        raise ConfigError(f"--utilisation {arguments.utilisation}: a share of the peak, above 0 and at most 1")
    url = arguments.data or (config.data.train if isinstance(config.data.train, str) else "")
    studies, study_bytes = arguments.studies, arguments.study_bytes
    if url:
        manifest = read_manifest(url, config.data.store).of_split(config.data.train_split)
        studies = studies or manifest.samples
        study_bytes = study_bytes or sum(shard.bytes for shard in manifest.shards) / manifest.samples
    return Site(
        nodes=arguments.nodes, gpus=arguments.gpus, gpu=arguments.gpu, network_gbit=arguments.network_gbit,
        utilisation=arguments.utilisation, study_bytes=study_bytes or 0.0, studies=studies, epochs=arguments.epochs,
        price=arguments.price, price_gb_month=arguments.price_per_gb_month,
        price_million_reads=arguments.price_per_million_reads, price_gb_read=arguments.price_per_gb_read,
        cores=arguments.cores, loader_ms=arguments.loader_ms,
    )  # fmt: skip


def _check_ranks(config: TrainConfig, site: Site) -> None:
    lanes_of_rank(0, site.ranks, config.data.lanes, config.global_batch_size)  # says what would fit


def counted(config: TrainConfig) -> cost.Cost:
    """A study's cost, counted on this CPU with the recipe's own task."""
    words = vocabulary(config)
    task_config = config.task
    if hasattr(
        task_config, "match_group"
    ):  # it must divide the few studies of a count, and costs the same whatever it is
        task_config = replace(task_config, match_group=cost.FEW)
    task = task_config.build(vocab_size=words, seed=config.seed)
    task.take_tokenizer(_OneToken())
    if config.engine.activation_checkpointing:
        checkpoint_activations(task)
    attention.take_only("sdpa")  # as a GPU does
    try:
        return cost.measure(
            task,
            lambda studies: synthetic_batch(config, studies, words),
            half_precision=config.engine.precision != "fp32",
        )
    finally:
        attention.take_only(None)


class _OneToken:
    """Stands for a tokenizer where words of a task's own are only counted: every text is one token."""

    prefix, suffix = (0,), (0,)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        shape = (len(texts), 3)
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)


def vocabulary(config: TrainConfig) -> int:
    """Words of the text encoder, or of the tokenizer that the run would train."""
    text = getattr(config.task, "text", None)
    return getattr(text, "vocab_size", None) or config.tokenizer_words


def _label_columns(config: TrainConfig) -> int:
    texts = config.data.label_text
    return len(texts.classes) if texts is not None else getattr(config.task, "labels", 0)


def synthetic_batch(config: TrainConfig, studies: int, words: int) -> Batch:
    """Noise in the shapes of the recipe, one image a study, texts of full length."""
    side, length = config.data.decode.image_size, config.data.text_length
    generator = torch.Generator().manual_seed(0)
    patches = (side // config.data.masking.patch_size) ** 2
    masked = round(config.data.masking.patch_mask_ratio * patches)
    number = torch.arange(studies)
    text = torch.randint(5, words, (studies, length), generator=generator)
    columns: dict[str, Tensor] = {
        "labels": torch.zeros(studies, _label_columns(config), dtype=torch.int8),
        "text_is_report": torch.ones(studies, dtype=torch.bool),
        "pixel_values": torch.randn(studies, 1, side, side, generator=generator),
        "input_ids": text,
        "attention_mask": torch.ones(studies, length, dtype=torch.bool),
        "study_index": number,
        "valid": torch.ones(studies, dtype=torch.bool),
        "section_ids": torch.full((studies, length), 3),
        "text_mask": torch.arange(length).expand(studies, -1) % 6 == 1,
        "token_weight": (torch.arange(length).expand(studies, -1) % 4 != 0).float(),
        "attention_grid": torch.ones(studies, patches),
        "patch_mask": (torch.arange(patches) < masked).expand(studies, -1),
    }
    keys = (
        "report_key", "finding_key", "patient_key", "draw_key", "sample_id", "set_index", "epoch", "cut_tokens",
        "dropped_sentences",
    )  # fmt: skip
    if config.data.volume is not None:
        columns |= _synthetic_volumes(config.data.volume, studies, text)
    known = columns | dict.fromkeys(keys, number)
    fields = schema.task_class(config.task).fields
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ConfigError(f"{config.recipe}: no synthetic {', '.join(unknown)} to count a study's cost with")
    return {name: known[name] for name in fields}


def _synthetic_volumes(volume: VolumeDecoder.Config, studies: int, text: Tensor) -> dict[str, Tensor]:
    """Crops with every anatomy whole; in each study `ABNORMAL_SHARE` of them have a text `[studies, L]` of their own.

    All others share one, the template: a study encodes none of its own for them.
    """
    anatomies, length = len(volume.anatomies), text.shape[1]
    abnormal = torch.arange(anatomies) < max(1, round(ABNORMAL_SHARE * anatomies))
    key = abnormal * (1 + torch.arange(studies * anatomies).view(studies, anatomies))
    ids = torch.where(abnormal[:, None], text[:, None] + torch.zeros(anatomies, 1, dtype=torch.int64), 5)
    return {
        "pixel_values": torch.zeros(studies, len(volume.windows_hu), *volume.size),
        "anatomy_share": torch.full((studies, anatomies, volume.patches), 0.1),
        "anatomy_intact": torch.ones(studies, anatomies, dtype=torch.bool),
        "anatomy_input_ids": ids,
        "anatomy_attention_mask": torch.ones(studies, anatomies, length, dtype=torch.bool),
        "anatomy_text_key": torch.where(key == 0, -1, key),
        "anatomy_key": key,
        "anatomy_state": (key != 0).to(torch.int8),
    }


def plan(config: TrainConfig, site: Site, of: cost.Cost) -> list[Line]:
    """The lines, in the order of a reader's questions: does it fit, is it fed, how long, how much."""
    compute, network = _compute(config, site, of), _network(config, site, of)
    compute_s, network_s = compute[-1].value, network[-1].value
    loader = _loader(config, site, max(compute_s, network_s))
    seconds = {"compute": compute_s, "network": network_s, "loader": loader[-1].value}
    slowest = max(seconds, key=lambda part: seconds[part])
    step_s = seconds[slowest]
    step = [
        Line("step/seconds", step_s, "s", f"the slowest of compute, network and loader, which overlap: {slowest}"),
        Line("step/studies_per_s", config.global_batch_size / step_s, "1/s",
             f"{config.global_batch_size} / {step_s:.3g} s"),
    ]  # fmt: skip
    rest = [*_store(config, site, step_s), *_run(config, site, step_s, of)]
    return [*_parameters(of), *_memory(config, site, of), *compute, *network, *loader, *step, *rest]


def _parameters(of: cost.Cost) -> list[Line]:
    parts = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in of.parameters.items() if count >= 1e5)
    return [Line("parameters", sum(of.parameters.values()) / 1e6, "million", parts)]


def _optimizer_bytes(config: TrainConfig) -> int:
    """Of each trained weight: two moments, and the flat fp32 copy that ZeRO steps whatever the weights' precision."""
    return 12 if config.engine.zero_stage >= 1 else 8


def _memory(config: TrainConfig, site: Site, of: cost.Cost) -> list[Line]:
    """Of one GPU, GB. P parameters, W ranks."""
    engine, ranks = config.engine, site.ranks
    weights, trained = sum(of.parameters.values()), of.trained
    share = {"states": ranks if engine.zero_stage >= 1 else 1, "gradients": ranks if engine.zero_stage >= 2 else 1}
    share["weights"] = ranks if engine.zero_stage == 3 else 1
    master = engine.precision == "bf16_master"
    size = 2 if master else 4

    def divided(by: int) -> str:
        return f" / {by} ranks" if by > 1 else ""

    states = _optimizer_bytes(config)
    own = config.global_batch_size // ranks
    together = min(engine.micro_batch or own, own)
    lines = [
        Line("memory/weights", size * weights / share["weights"] / GB, "GB",
             f"{size} B x {weights / 1e6:.1f} M{divided(share['weights'])}"),
        Line("memory/gradients", 4 * trained / share["gradients"] / GB, "GB",
             f"4 B x {trained / 1e6:.1f} M{divided(share['gradients'])}"),
        Line("memory/optimizer", states * trained / share["states"] / GB, "GB",
             f"{states} B (two moments{', fp32 copy' if states == 12 else ''}) x {trained / 1e6:.1f} M"
             f"{divided(share['states'])}"),
        Line("memory/buckets", (BUCKETS_BYTES if ranks > 1 else 0) / GB, "GB", "DeepSpeed's, 2 x 50 M x 4 B"),
        Line("memory/activations", (of.kept_bytes * together + of.fixed_bytes) / GB, "GB",
             f"{of.kept_bytes / 1e6:.1f} MB a study (counted) x {together} together + {of.fixed_bytes / 1e6:.0f} MB"),
        Line("memory/global_batch", of.gathered_bytes * config.global_batch_size / GB, "GB",
             f"{of.gathered_bytes:.0f} B a study x {config.global_batch_size}"),
    ]  # fmt: skip
    total, room = sum(line.value for line in lines), GPU_GB[site.gpu]
    verdict = "fits" if total < 0.9 * room else f"does NOT fit: {_way_out(config, together)}"
    return [*lines, Line("memory/total", total, "GB", f"of {room} GB ({site.gpu}), 10 % kept free: {verdict}")]


def _way_out(config: TrainConfig, together: int) -> str:
    if together > 1:
        return f"set engine.micro_batch={max(1, together // 2)}"
    if not config.engine.activation_checkpointing:
        return "set engine.activation_checkpointing=true"
    return "raise engine.zero_stage, or take more ranks"


def _compute(config: TrainConfig, site: Site, of: cost.Cost) -> list[Line]:
    """Arithmetic of a step; the last line is its seconds."""
    cached = config.engine.micro_batch is not None and config.engine.micro_batch * site.ranks < config.global_batch_size
    passes = 3 + cached + config.engine.activation_checkpointing  # a backward costs two forwards
    why = "forward 1, backward 2" + (", cached 1" if cached else "")
    why += ", recomputed 1" if config.engine.activation_checkpointing else ""
    peak = next(flops for name, flops in PEAK_FLOPS.items() if site.gpu.startswith(name))
    peak *= 1.0 if config.engine.precision != "fp32" else 0.5
    flop = passes * of.flop * config.global_batch_size
    return [
        Line("compute/flop", flop / 1e12, "TFLOP",
             f"a step: {of.flop / 1e9:.3g} GFLOP a study (counted) x {passes} ({why}) x {config.global_batch_size}"),
        Line("compute/seconds", flop / (site.ranks * peak * site.utilisation), "s",
             f"/ ({site.ranks} GPUs x {peak / 1e12:.0f} TFLOP/s x {site.utilisation} (assumed))"),
    ]  # fmt: skip


def _network(config: TrainConfig, site: Site, of: cost.Cost) -> list[Line]:
    """Bytes of a step between GPUs; the last line is the seconds that they need between nodes."""
    ranks = site.ranks
    around = (ranks - 1) / ranks
    passes = 3 if config.engine.zero_stage == 3 else 2  # ZeRO 3 gathers weights for the backward once more
    gradients = passes * around * 4 * of.trained
    rows = around * of.gathered_bytes * config.global_batch_size
    # Rings go through each node's link once, however many GPUs it has.
    over_link = (gradients + rows) if site.nodes > 1 else 0.0
    return [
        Line("network/weights_gb", gradients / GB, "GB",
             f"a step and GPU: {passes} x {around:.3f} x 4 B x {of.trained / 1e6:.1f} M"),
        Line("network/embeddings_gb", rows / GB, "GB",
             f"a step and GPU: {around:.3f} x {of.gathered_bytes:.0f} B x {config.global_batch_size}"),
        Line("network/seconds", over_link / (site.network_gbit / 8 * GB), "s",
             f"{over_link / GB:.2f} GB over {site.network_gbit:.0f} Gbit/s a node"),
    ]  # fmt: skip


def _loader(config: TrainConfig, site: Site, others_s: float) -> list[Line]:
    """Whether the loaders' cores keep up with GPUs whose step takes `others_s`; the last line is their own seconds."""
    studies, volume = config.global_batch_size, config.data.volume
    if site.loader_ms is not None:
        of_study, why = site.loader_ms, "--loader-ms"
    elif volume is not None:
        of_study = VOLUME_MS * math.prod(volume.taken) / VOLUME_VOXELS
        sides = " x ".join(map(str, volume.taken))
        why = f"{VOLUME_MS:.0f} ms (ci.bench ct_loader, no label maps) x {sides} voxels / {VOLUME_VOXELS / 1e6:.1f} M"
    else:
        of_study, why = IMAGE_MS, "2 threads / 588 images/s (ci.bench loader, 512-px JPEG), one image a study"
    work_s, have = of_study / 1000 * studies, site.cores / site.gpus
    needed = work_s / others_s / site.ranks
    threads = "data.volume.threads" if volume is not None else "data.decode.threads"
    verdict = f"keeps up with {threads}={math.ceil(needed)}"
    if needed > have:
        verdict = f"does NOT keep up: take nodes of {math.ceil(needed * site.gpus)} cores"
    return [
        Line("loader/cpu_ms", of_study, "ms", f"of a core, a study: {why}"),
        Line("loader/cores_per_gpu", needed, "cores",
             f"{of_study:.3g} ms x {studies} / {others_s:.3g} s / {site.ranks} GPUs, of {have:.3g}: {verdict}"),
        Line("loader/seconds", work_s / (site.nodes * site.cores), "s",
             f"a step: {of_study:.3g} ms x {studies} / ({site.nodes} nodes x {site.cores:g} cores)"),
    ]  # fmt: skip


def _store(config: TrainConfig, site: Site, step_s: float) -> list[Line]:
    if not site.study_bytes:
        return []
    rate = site.study_bytes * config.global_batch_size / step_s
    return [
        Line("store/mb_per_s", rate / 1e6, "MB/s",
             f"{site.study_bytes / 1e3:.1f} kB a study x {config.global_batch_size} / {step_s:.3g} s"),
        Line("store/mb_per_s_per_node", rate / site.nodes / 1e6, "MB/s", f"/ {site.nodes} nodes"),
    ]  # fmt: skip


def _run(config: TrainConfig, site: Site, step_s: float, of: cost.Cost) -> list[Line]:
    steps, how = float(config.trainer.steps), "trainer.steps of the recipe"
    if site.epochs is not None:
        if site.studies is None:
            raise ConfigError("--epochs needs --studies, or a manifest (--data) that says how many there are")
        steps = site.epochs * site.studies / config.global_batch_size
        how = f"{site.epochs:g} epochs x {site.studies:,} studies / {config.global_batch_size}"
    hours = steps * step_s / 3600
    lines = [
        Line("run/steps", steps, "", how),
        Line("run/hours", hours, "h", f"{steps:,.0f} x {step_s:.3g} s, without evaluation and restarts"),
        Line("run/gpu_hours", hours * site.ranks, "h", f"x {site.ranks} GPUs"),
    ]
    costs = _costs(config, site, steps, hours, of)
    if costs:
        total = sum(line.value for line in costs)
        lines += [*costs, Line("run/price", total, "", "their sum, in the currency of the prices")]
        if site.studies is not None:
            epochs = steps * config.global_batch_size / site.studies
            lines.append(
                Line("run/price_per_epoch", total / epochs, "", f"/ {epochs:.3g} epochs of {site.studies:,} studies")
            )
    return lines


def _costs(config: TrainConfig, site: Site, steps: float, hours: float, of: cost.Cost) -> list[Line]:
    """What is paid for the run, where a price is given. Raises ConfigError where a price has nothing to multiply."""
    lines = []
    if site.price is not None:
        lines.append(
            Line("run/price_gpus", hours * site.ranks * site.price, "", f"{hours * site.ranks:,.3g} h x {site.price:g}")
        )
    of_store = (site.price_gb_month, site.price_million_reads, site.price_gb_read)
    if all(price is None for price in of_store):
        return lines
    if not site.study_bytes or site.studies is None:
        raise ConfigError(
            "prices of the store need --study-bytes and --studies, or a manifest (--data) that says what there is"
        )
    read = steps * config.global_batch_size * site.study_bytes
    if site.price_gb_month is not None:
        # A checkpoint holds the weights twice, alone and in DeepSpeed's state; the newest two and the best are kept.
        checkpoint = 2 * 4 * sum(of.parameters.values()) + _optimizer_bytes(config) * of.trained
        stored = (site.studies * site.study_bytes + 3 * checkpoint) / GB
        months = hours / HOURS_A_MONTH
        lines.append(
            Line("run/price_storage", stored * months * site.price_gb_month, "",
                 f"{stored:,.3g} GB (set, 3 checkpoints) x {months:.3g} months x {site.price_gb_month:g}")
        )  # fmt: skip
    if site.price_million_reads is not None:
        requests = read / max(CHUNK_BYTES, site.study_bytes) / 1e6
        lines.append(
            Line("run/price_requests", requests * site.price_million_reads, "",
                 f"{requests:,.3g} million chunks x {site.price_million_reads:g}")
        )  # fmt: skip
    if site.price_gb_read is not None:
        lines.append(
            Line("run/price_bytes", read / GB * site.price_gb_read, "", f"{read / GB:,.3g} GB x {site.price_gb_read:g}")
        )
    return lines


def _show(recipe: str, site: Site, lines: Sequence[Line]) -> None:
    table = Table(title=f"{recipe} on {site.nodes} x {site.gpus} {site.gpu}", title_justify="left")
    for name, justify in (("", "left"), ("value", "right"), ("", "left"), ("formula", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    group = ""
    for line in lines:
        before, group = group, line.name.partition("/")[0]
        if before and before != group:
            table.add_section()
        table.add_row(line.name, _digits(line.value), line.unit, line.formula)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
