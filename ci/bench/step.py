"""One training step on the CPU: ours against open_clip's, and packed reports against padded ones.

A step is forward, loss, backward and AdamW (torch's fused one on both sides), batch 16 at 224 px. Every contestant
lives in a process of its own that waits while another is timed; all get the same threads. open_clip runs in each of its
bf16 modes first, and the fastest is the peer.

Which precision to train in on a CPU is `step.autocast_vs_master`: fp32 weights under autocast (`engine.precision=bf16`)
cast every weight once a step, bf16 weights are written back from their fp32 masters; the products are the same.

open_clip comes from .venv/peers (`bash ci/bench/setup_peers.sh`). It imports torchvision for image transforms that no
step uses, and PyPI's torchvision does not load beside a CPU torch ("operator torchvision::nms does not exist"). Where
it does not load, the peer's process, and only it, gets an empty stand-in.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ci.bench import process
from ci.bench.figure import REPOSITORY, Figure, alternate, ratio
from core import collectives
from core.models.text import bert_base, clip_text_b16
from core.models.vision import vit_b16
from core.tasks import Task
from core.tasks.clip import CLIP
from shards.batch import Batch
from shards.errors import ConfigError

DESCRIPTION = "training step of ViT-B/16 with a text tower on the CPU: against open_clip, and packed against padded"

PEERS_PYTHON = REPOSITORY / ".venv" / "peers" / "bin" / "python"
THREADS = 2
BATCH = 16
LEARNING_RATE = 1e-4
VOCABULARY = {"clip": 49408, "bert": 30522}
# Tokens of 1,850 Open-i reports (findings and impression) at 16 evenly spaced quantiles: each batch is the whole
# distribution. CLIP's byte-pair vocabulary and BERT's uncased WordPiece, start and end tokens included.
REPORT_TOKENS = {
    "clip": (22, 32, 37, 41, 46, 50, 53, 57, 60, 65, 68, 74, 81, 90, 106, 134),
    "bert": (23, 33, 40, 45, 49, 54, 58, 62, 65, 70, 74, 80, 88, 98, 114, 142),
}
# Its `bf16` casts some layers by name and fails on a Hugging Face text tower (fp32 norms into bf16 products).
PEER_MODES = {"clip": ("amp_bf16", "bf16", "pure_bf16"), "bert": ("amp_bf16", "pure_bf16")}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What one process runs. `context`: tokens the peer pads to, and where longer reports are cut.

    `mode`: open_clip's `--precision`; ours `autocast` (fp32 weights, the engine's `bf16`), `master` (bf16 weights with
    fp32 masters: the engine's `bf16_master`).
    """

    system: Literal["ours", "open_clip"]
    mode: str
    text: Literal["clip", "bert"] = "clip"
    context: int = 77
    real_lengths: bool = False
    unpadded: bool = True
    depth: int = 12
    image_size: int = 224

    @property
    def name(self) -> str:
        """As shown in tables."""
        return f"{self.system} {self.mode}{'' if self.unpadded else ' padded'}"


# ---- inside a contestant's process ----


def _text_batch(contestant: Contestant) -> tuple[Tensor, Tensor]:
    """`input_ids [16, context]` int64 and `attention_mask` bool; the largest id ends a report, as open_clip expects."""
    generator = torch.Generator().manual_seed(1)
    last_id = VOCABULARY[contestant.text] - 1
    drawn = REPORT_TOKENS[contestant.text] if contestant.real_lengths else (contestant.context,) * BATCH
    lengths = torch.tensor(drawn).clamp(max=contestant.context)
    ids = torch.randint(1, last_id, (BATCH, contestant.context), generator=generator)
    place = torch.arange(contestant.context)[None]
    ids = torch.where(place == lengths[:, None] - 1, last_id, ids)
    mask = place < lengths[:, None]
    return ids * mask, mask


def _our_step(contestant: Contestant) -> Callable[[], float]:
    vision = replace(vit_b16(), channels=3, patch_bias=False, input_norm=True, norm_epsilon=1e-5)
    vision = replace(vision, depth=contestant.depth, image_size=contestant.image_size)
    text = clip_text_b16() if contestant.text == "clip" else bert_base()
    text = replace(text, depth=contestant.depth, max_length=max(77, contestant.context), unpadded=contestant.unpadded)
    task = CLIP.Config(vision=vision, text=text).build(vocab_size=VOCABULARY[contestant.text])
    ids, mask = _text_batch(contestant)
    batch: Batch = {
        "pixel_values": torch.randn(BATCH, 3, vision.image_size, vision.image_size),
        "study_index": torch.arange(BATCH),
        "valid": torch.ones(BATCH, dtype=torch.bool),
        "input_ids": ids,
        "attention_mask": mask,
        "report_key": torch.arange(BATCH),
    }
    if contestant.mode != "master":
        return plain_step(task, batch, learning_rate=LEARNING_RATE)
    weights = list(task.parameters())
    masters = [weight.detach().clone().requires_grad_() for weight in weights]
    task.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)

    def step() -> float:
        encoded = task.encode(batch)
        loss = task.objective(collectives.gather(encoded.gather), encoded.local).loss
        loss.backward()
        for held, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            held.grad = weight.grad.float()
        optimizer.step()
        with torch.no_grad():
            for held, weight in zip(masters, weights, strict=True):
                weight.copy_(held)
        task.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def plain_step(task: Task, batch: Batch, *, learning_rate: float) -> Callable[[], float]:
    """A step of a task on one batch under bf16 autocast, without the engine around it; returns the loss."""
    optimizer = torch.optim.AdamW(task.parameters(), lr=learning_rate, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            encoded = task.encode(batch)
        loss = task.objective(collectives.gather(encoded.gather), encoded.local).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


class _EmptyModule(types.ModuleType):
    """A module in which every name is an empty class: enough for `from torchvision.transforms import Resize`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"BILINEAR": "bilinear", "BICUBIC": "bicubic"})


def _stand_in_for_torchvision() -> None:
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops"):
        _empty(name)
    _empty("torchvision.ops.misc")


def _empty(name: str) -> None:
    module = _EmptyModule(name)
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _open_clip() -> Any:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        # transformers asks once whether torchvision is there, and must hear no.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        from transformers import BertModel  # noqa: F401

        _stand_in_for_torchvision()
    import open_clip

    return open_clip


def _open_clip_model(contestant: Contestant) -> nn.Module:
    open_clip = _open_clip()
    if contestant.text == "clip" and contestant.depth == 12:
        model: nn.Module = open_clip.create_model(
            "ViT-B-16", precision=contestant.mode, force_context_length=contestant.context
        )
        return model
    from open_clip.factory import get_model_config

    config = get_model_config("ViT-B-16")
    config["vision_cfg"] |= {"layers": contestant.depth, "image_size": contestant.image_size}
    config["text_cfg"]["layers"] = contestant.depth
    with tempfile.TemporaryDirectory() as folder:
        if contestant.text == "bert":
            # Dropout off: ours has none.
            bert = {"model_type": "bert", "vocab_size": VOCABULARY["bert"], "num_hidden_layers": contestant.depth}
            bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "architectures": ["BertModel"]}
            Path(folder, "config.json").write_text(json.dumps(bert))
            config["text_cfg"] = {
                "hf_model_name": folder,
                "hf_model_pretrained": False,
                "hf_pooler_type": "cls_pooler",
                "hf_proj_type": "linear",
            }
        kind = open_clip.CustomTextCLIP if contestant.text == "bert" else open_clip.CLIP
        pure = contestant.mode == "pure_bf16"
        cast = torch.bfloat16 if contestant.mode == "bf16" else None
        model = kind(**config, cast_dtype=cast)
        if pure:
            model.to(torch.bfloat16)
        elif cast is not None:
            from open_clip.model import convert_weights_to_lp

            convert_weights_to_lp(model, dtype=cast)
    return model


def _open_clip_step(contestant: Contestant) -> Callable[[], float]:
    model = _open_clip_model(contestant).train()
    contrast = _open_clip().ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, _ = _text_batch(contestant)
    image = torch.randn(BATCH, 3, contestant.image_size, contestant.image_size)
    autocast = contestant.mode == "amp_bf16"
    image = image if autocast else image.bfloat16()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            image_embeds, text_embeds, scale = model(image, ids)[:3]
            loss = contrast(image_embeds, text_embeds, scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _made(contestant: Contestant) -> Callable[[], float]:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    return (_our_step if contestant.system == "ours" else _open_clip_step)(contestant)


# ---- the benchmark ----


@contextmanager
def _running(contestant: Contestant) -> Iterator[Callable[[], float]]:
    """A process of `contestant`; yields a function that gives images/s of one more step."""
    python = str(PEERS_PYTHON) if contestant.system == "open_clip" else sys.executable
    command = [python, "-m", "ci.bench.step", json.dumps(asdict(contestant))]
    name = f"{contestant.name} with {contestant.text} text"
    with process.running(command, name, threads=THREADS) as measure:
        yield lambda: BATCH / measure().seconds


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fastest_peer(of: Contestant, steps: int, quick: bool) -> tuple[Contestant, str]:
    """open_clip's fastest bf16 mode, and the images/s of each in words; `quick` tries one."""
    rates: dict[str, float] = {}
    for mode in PEER_MODES[of.text][-1:] if quick else PEER_MODES[of.text]:
        with _running(replace(of, system="open_clip", mode=mode)) as measure:
            rates[mode] = max(measure() for _ in range(steps))
        _log(f"open_clip {mode}, {of.text} text: {rates[mode]:.2f} images/s")
    best = max(rates, key=lambda mode: rates[mode])
    told = ", ".join(f"{mode} {rate:.2f}" for mode, rate in rates.items())
    return replace(of, system="open_clip", mode=best), f"open_clip's modes: {told} images/s"


def _compare(figure_id: str, ours: Contestant, peer: Contestant, rounds: int, note: str, **unlisted: Any) -> Figure:
    started = time.perf_counter()
    with _running(ours) as measure_ours, _running(peer) as measure_peer:
        rates = alternate({"ours": measure_ours, peer.name: measure_peer}, rounds, log=_log)
    return ratio(
        figure_id, rates["ours"], rates[peer.name], peer_name=f"{peer.name} (images/s)", threads=THREADS,
        wall_s=time.perf_counter() - started, note=note, **unlisted,
    )  # fmt: skip


def _bf16_gflops() -> float:
    """What this CPU gives the matrix product of a ViT-B/16 MLP now, GFLOP/s: the ceiling of any step."""
    torch.set_num_threads(THREADS)
    x, weight = torch.randn(BATCH * 197, 768).bfloat16(), torch.randn(3072, 768).bfloat16()
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(5):
            torch.nn.functional.linear(x, weight)
        best = max(best, 5 * 2 * x.numel() * 3072 / (time.perf_counter() - started) / 1e9)
    return best


def _step_gflop(contestant: Contestant) -> float:
    """Products of one step, forward and twice that backward: all weights but tables, and attention."""
    tokens = {"vision": 197 * BATCH, "text": int(_text_batch(contestant)[1].sum())}
    width = {"vision": 768, "text": 512 if contestant.text == "clip" else 768}
    length = {"vision": 197, "text": contestant.context}
    multiply_adds = sum(
        12 * (12 * width[tower] ** 2 + 2 * length[tower] * width[tower]) * tokens[tower] for tower in tokens
    )
    return 3 * 2 * multiply_adds / 1e9


def run(quick: bool) -> list[Figure]:
    """The figures of `step`; `quick` uses two layers at 64 px and one round."""
    if not PEERS_PYTHON.is_file():
        raise ConfigError(f"{PEERS_PYTHON} is missing, where open_clip lives; run bash ci/bench/setup_peers.sh")
    rounds, peer_steps = (1, 1) if quick else (7, 3)
    shape = {"depth": 2, "image_size": 64} if quick else {}
    base = Contestant(system="ours", mode="autocast", **shape)  # type: ignore[arg-type]
    free = {"unit": "ratio", "better": "higher"}

    peer, modes = _fastest_peer(base, peer_steps, quick)
    against_clip = _compare("step.vs_open_clip", base, peer, rounds, modes)
    if not quick and against_clip.ours is not None:
        reached = _step_gflop(base) * against_clip.ours / BATCH
        note = f"{modes}; ours does {reached:.0f} GFLOP/s, a lone bf16 product {_bf16_gflops():.0f}"
        against_clip = replace(against_clip, note=note)
    real = replace(base, real_lengths=True)
    peer_real = replace(peer, real_lengths=True)
    figures = [
        against_clip,
        _compare(
            "step.vs_open_clip_real_lengths",
            real,
            peer_real,
            rounds,
            "the same, Open-i report lengths cut at 77",
            **free,
        ),
    ]

    bert = replace(base, text="bert")
    peer, modes = _fastest_peer(bert, peer_steps, quick)
    figures.append(_compare("step.vs_open_clip_bert", bert, peer, rounds, f"BERT-base on both sides; {modes}"))

    recipe = replace(base, text="bert", context=128, real_lengths=True)
    note = "chest:clip_b16's towers, Open-i report lengths cut at 128; padded to the longest of the batch"
    figures.append(_compare("step.unpadded_vs_padded", recipe, replace(recipe, unpadded=False), rounds, note))
    note = "the same with CLIP's text tower, cut at 77: text is a seventh of the work"
    figures.append(_compare("step.unpadded_vs_padded_clip", real, replace(real, unpadded=False), rounds, note, **free))
    note = "fp32 weights cast by autocast once a step, over bf16 weights with fp32 masters"
    figures.append(_compare("step.autocast_vs_master", base, replace(base, mode="master"), rounds, note, **free))
    return figures


if __name__ == "__main__":
    process.serve(partial(_made, Contestant(**json.loads(sys.argv[1]))))
