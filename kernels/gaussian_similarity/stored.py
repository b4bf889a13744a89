"""The same losses with the logits of one small problem held between the passes: no recompute, one set of exponentials.

For problems whose N x M is small beside N x K. No groups, no teacher: those are for the sweeps.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from kernels.gaussian_similarity.blocked import Accumulator, logits_of, positive_pairs, positive_sums, products_of
from kernels.gaussian_similarity.problem import Gradients, Problem, loss_of


def info_nce(
    problem: Problem, *, row_weight: Tensor, column_weight: Tensor, row_target: Tensor, column_target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], logits [N, M], its derivative by each logit [N, M]); arguments as in `op`."""
    i, j = _whole(problem)
    with products_of(problem):
        logits = logits_of(problem, i, j)
    positive = positive_pairs(problem, i, j)
    of_positive = logits.new_zeros(len(row_weight)), logits.new_zeros(len(column_weight))
    if positive is not None:
        of_positive = positive_sums(logits, positive)
    loss, seed = logits.new_zeros(()), None
    for dim, own, weight, target in (
        (1, of_positive[0], row_weight, row_target),
        (0, of_positive[1], column_weight, column_target),
    ):
        maximum = logits.amax(dim, keepdim=True)
        softmax = (logits - maximum).exp_()
        total = softmax.sum(dim, keepdim=True)
        loss += loss_of(weight, (maximum + total.log()).squeeze(dim), target, own)
        share = weight.unsqueeze(dim) / total
        seed = softmax.mul_(share) if seed is None else seed.addcmul_(softmax, share)
    assert seed is not None
    if positive is not None:
        seed[positive] -= row_target[positive[0]] + column_target[positive[1]]
    return loss, logits, seed


def pairwise_sigmoid(problem: Problem, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum over pairs [], logits [N, M] without `bias`, derivative by each [N, M])."""
    i, j = _whole(problem)
    with products_of(problem):
        logits = logits_of(problem, i, j)
    biased = logits + bias
    total, positive = softplus(biased).sum(), positive_pairs(problem, i, j)
    if positive is not None:
        total -= biased[positive].sum()
    seed = biased.sigmoid_()
    if positive is not None:
        seed[positive] -= 1
    return total, logits, seed


def gradients(problem: Problem, logits: Tensor, seed: Tensor, *, with_bias: bool = False) -> Gradients:
    """Of `sum(seed * logit)`."""
    found = Accumulator(problem)
    with products_of(problem):
        found.add(*_whole(problem), seed, logits)
    return found.gradients(with_bias=with_bias)


def _whole(problem: Problem) -> tuple[slice, slice]:
    return slice(0, len(problem.rows)), slice(0, len(problem.columns))
