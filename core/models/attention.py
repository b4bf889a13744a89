"""Self-attention on dense and on packed tokens; which implementation runs is chosen once per case and logged.

Three twins with one signature: flash-attn (CUDA, where installed), torch's scaled_dot_product_attention, and a plain
matmul-softmax with a hand-written backward, which is the fastest on a CPU at short lengths. The choice is a function of
device and length alone, never of a timing at start-up: a run that resumes must take the path it took before.

Letters: T = packed tokens, S = sequences, L = length (padded), H = heads, K = head size, D = H * K.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

Implementation = Literal["flash", "sdpa", "matmul"]

# Longest sequence for matmul-softmax on a CPU. Forward + backward in bf16, its time over SDPA's: 0.27 at length 64,
# 0.36 at 128, 0.58 at 256, 0.73 at 512, 0.95 at 1,024 (torch 2.13, one core); its memory, [S, H, L, L], ends it here.
CPU_MATMUL_MAX_LENGTH = 512


@cache
def flash_attention_installed() -> bool:
    """Whether the flash-attn package can be imported; it is never required."""
    return importlib.util.find_spec("flash_attn") is not None


_only: Implementation | None = None


def take_only(implementation: Implementation | None) -> None:
    """Have the whole process take one implementation from now on; None: what is fastest."""
    global _only  # noqa: PLW0603  (a property of the process, as the device is)
    _only = implementation
    choose.cache_clear()


@cache
def choose(device_type: str, length: int, half_precision: bool) -> Implementation:
    """Implementation for one (device, padded length, dtype class); each that is chosen on a device is logged once."""
    chosen: Implementation
    if _only is not None:
        chosen = _only
    elif device_type == "cuda" and half_precision and flash_attention_installed():
        chosen = "flash"
    elif device_type == "cpu" and length <= CPU_MATMUL_MAX_LENGTH:
        chosen = "matmul"
    else:
        chosen = "sdpa"
    _say(device_type, half_precision, chosen)
    return chosen


@cache
def _say(device_type: str, half_precision: bool, chosen: Implementation) -> None:
    precision = "16 bit" if half_precision else "32 bit"
    upto = f" up to {CPU_MATMUL_MAX_LENGTH} tokens" if chosen == "matmul" else ""
    log.info("attention on %s, %s: %s%s", device_type, precision, chosen, upto)


class _MatmulAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(K)) v with the probabilities kept for backward, in the dtype of the input."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, hidden: Tensor | None) -> Tensor:
        sequences, length, _, heads, size = qkv.shape
        # [S, L, 3, H, K] -> [3, S * H, L, K], one copy, so that every product below is a plain batched one.
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, sequences * heads, length, size).unbind(0)
        # beta=0 ignores the first operand: the scale rides on the product. [S * H, L, L]
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=size**-0.5)
        if hidden is not None:
            scores.view(sequences, heads, length, length).masked_fill_(hidden, -torch.inf)
        probability = torch.softmax(scores, dim=-1)
        mixed = torch.bmm(probability, v)  # [S * H, L, K]
        ctx.save_for_backward(q, k, v, probability)
        ctx.shape = qkv.shape
        return mixed.view(sequences, heads, length, size).transpose(1, 2).reshape(sequences, length, heads * size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, k, v, probability = ctx.saved_tensors
        sequences, length, _, heads, size = ctx.shape
        grad = grad.view(sequences, length, heads, size).transpose(1, 2).reshape(sequences * heads, length, size)
        grad_qkv = grad.new_empty((3, sequences * heads, length, size))
        torch.bmm(probability.transpose(1, 2), grad, out=grad_qkv[2])
        seed = torch.bmm(grad, v.transpose(1, 2))  # [S * H, L, L]
        seed = torch._softmax_backward_data(seed, probability, -1, probability.dtype)
        unused, scale = q.new_zeros(1, 1, 1), size**-0.5
        torch.baddbmm(unused, seed, k, beta=0, alpha=scale, out=grad_qkv[0])
        torch.baddbmm(unused, seed.transpose(1, 2), q, beta=0, alpha=scale, out=grad_qkv[1])
        return grad_qkv.view(3, sequences, heads, length, size).permute(1, 3, 0, 2, 4).contiguous(), None


def dense_attention(
    qkv: Tensor, *, key_mask: Tensor | None = None, causal: bool = False, implementation: Implementation | None = None
) -> Tensor:
    """`qkv [S, L, 3, H, K]` -> `[S, L, H * K]`. `key_mask [S, L]` bool, False for keys to ignore.

    Rows of an ignored position hold unspecified numbers; a sequence needs at least one key, which with `causal` is its
    first. `implementation=None` asks `choose`; "flash" takes no mask (use `PackedLayout`).
    """
    length = qkv.shape[1]
    half = qkv.dtype in (torch.bfloat16, torch.float16)
    chosen = implementation or choose(qkv.device.type, length, half)
    if chosen == "flash" and key_mask is not None:
        chosen = "sdpa"  # masks reach flash-attn as packed sequences only
    if chosen == "flash":
        from flash_attn import flash_attn_qkvpacked_func

        flashed: Tensor = flash_attn_qkvpacked_func(qkv, causal=causal)
        return flashed.flatten(2)
    hidden = None  # [S or 1, 1, L or 1, L], True where a key is not seen
    if key_mask is not None:
        hidden = ~key_mask[:, None, None, :]
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=qkv.device).triu(1)[None, None]
        hidden = future if hidden is None else hidden | future
    with torch.autocast(qkv.device.type, enabled=False):
        if chosen == "matmul":
            mixed: Tensor = _MatmulAttention.apply(qkv, hidden)
            return mixed
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [S, H, L, K]
        only_causal = causal and key_mask is None
        seen = None if hidden is None or only_causal else ~hidden
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=only_causal)
        return out.transpose(1, 2).flatten(2)


def cross_attention(q: Tensor, kv: Tensor, key_mask: Tensor | None) -> Tensor:
    """`q [S, Q, H, K]`, `kv [S, L, 2, H, K]` -> `[S, Q, H * K]`: Q tokens ask L others. `key_mask [S, L]` as above."""
    with torch.autocast(q.device.type, enabled=False):
        queries = q.transpose(1, 2)  # [S, H, Q, K]
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each [S, H, L, K]
        seen = None if key_mask is None else key_mask[:, None, None, :]
        half = q.dtype in (torch.bfloat16, torch.float16)
        if choose(q.device.type, max(q.shape[1], kv.shape[1]), half) == "matmul":
            scores = queries @ keys.transpose(2, 3) * q.shape[-1] ** -0.5  # [S, H, Q, L]
            if seen is not None:
                scores = scores.masked_fill(~seen, -torch.inf)
            mixed = torch.softmax(scores, dim=-1) @ values
        else:
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return mixed.transpose(1, 2).flatten(2)


class _ScatterRows(torch.autograd.Function):
    """`x [T, ...]` to rows `index [T]` of `[rows, ...]` zeros; backward picks the same rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class _PickRows(torch.autograd.Function):
    """Rows `index [T]`, each at most once, of `x [rows, ...]`; backward scatters, which autograd would do by adding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros((ctx.rows, *grad.shape[1:])).index_copy_(0, index, grad), None


def pick_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index [n]` of `x [T, ...]`, none of them twice: the gradient is scattered, never added."""
    picked: Tensor = _PickRows.apply(x, index)
    return picked


class Layout(Protocol):
    """How the rows of a `[T, D]` token matrix form sequences; the only thing attention needs besides qkv."""

    def attend(self, qkv: Tensor) -> Tensor:
        """`[T, 3, H, K]` -> `[T, H * K]`, each token attending within its own sequence."""
        ...


@dataclass(frozen=True)
class DenseLayout:
    """S sequences of equal length L, one after the other; `key_mask [S, L]` only for the padded twin of packing."""

    sequences: int
    length: int
    causal: bool = False
    key_mask: Tensor | None = None

    def attend(self, qkv: Tensor) -> Tensor:
        dense = qkv.view(self.sequences, self.length, *qkv.shape[1:])
        return dense_attention(dense, key_mask=self.key_mask, causal=self.causal).flatten(0, 1)


@dataclass(frozen=True)
class Bucket:
    """Neighbouring sequences padded to one length for attention only; its tokens are neighbours too."""

    tokens: int  # t, of the token matrix
    sequences: int  # S
    length: int  # L, its longest sequence
    places: Tensor | None  # [t] place of each token in the padded [S * L]; None when nothing is padded
    key_mask: Tensor | None  # [S, L]; None when nothing is padded


@dataclass(frozen=True)
class PackedLayout:
    """Sequences of different lengths, shortest first, with no padding between them. Build with `from_mask`."""

    sequences: int
    token_index: Tensor  # [T] place of each packed token in the flattened [S * L] batch
    first_token: Tensor  # [S] packed row of each sequence's first token, sequences as in the batch
    last_token: Tensor  # [S] likewise its last
    lengths: Tensor  # [S] int64, as in the batch
    cumulative_lengths: Tensor  # [S + 1] int32, as packed: flash-attn's form
    max_length: int
    buckets: tuple[Bucket, ...]
    causal: bool = False

    @staticmethod
    def from_mask(mask: Tensor, *, causal: bool = False, max_buckets: int = 4) -> PackedLayout:
        """`mask [S, L]` bool, True for tokens: each row has at least one and all of them at its start."""
        sequences = mask.shape[0]
        lengths = mask.sum(dim=1)
        order = torch.argsort(lengths, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(sequences, device=mask.device))
        sorted_mask = mask[order]
        place = torch.arange(mask.numel(), device=mask.device).view_as(mask)[order]
        cumulative = F.pad(lengths[order].cumsum(0), (1, 0))
        host_lengths = lengths[order].tolist()
        return PackedLayout(
            sequences=sequences,
            token_index=place[sorted_mask],
            first_token=cumulative[:-1][inverse],
            last_token=cumulative[1:][inverse] - 1,
            lengths=lengths,
            cumulative_lengths=cumulative.to(torch.int32),
            max_length=max(host_lengths, default=0),
            buckets=_buckets(sorted_mask, host_lengths, max_buckets),
            causal=causal,
        )

    def pack(self, padded: Tensor) -> Tensor:
        """`[S, L, ...]` -> `[T, ...]`."""
        packed: Tensor = _PickRows.apply(padded.flatten(0, 1), self.token_index)
        return packed

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """`[T, ...]` -> `[S, length, ...]`, zeros in the padding; `length` is the mask's."""
        padded: Tensor = _ScatterRows.apply(packed, self.token_index, self.sequences * length)
        return padded.view(self.sequences, length, *packed.shape[1:])

    def attend(self, qkv: Tensor) -> Tensor:
        half = qkv.dtype in (torch.bfloat16, torch.float16)
        if choose(qkv.device.type, self.max_length, half) == "flash":
            from flash_attn import flash_attn_varlen_qkvpacked_func

            flashed: Tensor = flash_attn_varlen_qkvpacked_func(
                qkv, self.cumulative_lengths, self.max_length, causal=self.causal
            )
            return flashed.flatten(1)
        pieces = qkv.split([bucket.tokens for bucket in self.buckets])
        mixed = [self._attend_bucket(piece, bucket) for piece, bucket in zip(pieces, self.buckets, strict=True)]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _attend_bucket(self, qkv: Tensor, bucket: Bucket) -> Tensor:
        """`[t, 3, H, K]` -> `[t, H * K]`."""
        if bucket.places is not None:
            qkv = _ScatterRows.apply(qkv, bucket.places, bucket.sequences * bucket.length)
        dense = qkv.view(bucket.sequences, bucket.length, *qkv.shape[1:])
        # Under a causal mask the padding lies in the future of every real token: no key mask needed.
        mask = None if self.causal else bucket.key_mask
        mixed = dense_attention(dense, key_mask=mask, causal=self.causal).flatten(0, 1)
        if bucket.places is not None:
            mixed = _PickRows.apply(mixed, bucket.places)
        return mixed


def _buckets(sorted_mask: Tensor, lengths: list[int], max_buckets: int) -> tuple[Bucket, ...]:
    """Equal counts of sequences a bucket; `sorted_mask [S, L]` and `lengths` ascend."""
    sequences = len(lengths)
    count = min(max_buckets, sequences) if sequences and lengths[0] != lengths[-1] else min(1, sequences)
    borders = [sequences * i // count for i in range(count + 1)] if count else [0]
    buckets = []
    for start, stop in pairwise(borders):
        length = lengths[stop - 1]
        mask = sorted_mask[start:stop, :length]
        padded = lengths[start] != length
        buckets.append(
            Bucket(
                tokens=sum(lengths[start:stop]),
                sequences=stop - start,
                length=length,
                places=mask.flatten().nonzero().squeeze(1) if padded else None,
                key_mask=mask if padded else None,
            )
        )
    return tuple(buckets)
