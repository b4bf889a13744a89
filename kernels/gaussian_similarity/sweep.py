"""The sweeps over all pairs of a problem; the device of its rows says which code runs.

    statistics, gradients                      symmetric InfoNCE, any targets
    sigmoid_statistics, sigmoid_gradients      pairwise sigmoid

    density, density_gradients                 similarities that are no product

They are no autograd functions and know nothing of ranks: `op` wraps them for one process.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kernels.gaussian_similarity import blocked, densities
from kernels.gaussian_similarity.problem import Gradients, Problem, Statistics, Teacher

_LOG = logging.getLogger(__name__)


def statistics(problem: Problem, *, teacher: Teacher | None = None) -> Statistics:
    """Maximum, sum of exponentials and sum over positives of every row and column, in one walk over tiles."""
    return path_of(problem.rows).statistics(problem, teacher=teacher)  # type: ignore[no-any-return]


def gradients(
    problem: Problem,
    *,
    row_shift: Tensor,
    column_shift: Tensor,
    row_target: Tensor,
    column_target: Tensor,
    teacher: Teacher | None = None,
) -> Gradients:
    """Gradients of `sum(seed * logit)` with each tile computed again, for the seed [N, M]

        exp(logit + row_shift_i) + exp(logit + column_shift_j) - (row_target_i + column_target_j) * [keys equal]

    less the teacher's two targets. A shift is log(weight) - log_sum; -inf switches a row or column off.
    """
    return path_of(problem.rows).gradients(  # type: ignore[no-any-return]
        problem,
        row_shift=row_shift,
        column_shift=column_shift,
        row_target=row_target,
        column_target=column_target,
        teacher=teacher,
    )


def sigmoid_statistics(problem: Problem, bias: Tensor) -> Tensor:
    """`-sum(log sigmoid(y * (logit + bias)))` [], y = 1 for positives and -1 for all other pairs."""
    return path_of(problem.rows).sigmoid_statistics(problem, bias)  # type: ignore[no-any-return]


def sigmoid_gradients(problem: Problem, bias: Tensor) -> Gradients:
    """Gradients of `sigmoid_statistics`, `bias` among them."""
    return path_of(problem.rows).sigmoid_gradients(problem, bias)  # type: ignore[no-any-return]


def density(name: densities.Name, gaussians: densities.Gaussians) -> Tensor:
    """Similarity [N, M] of every pair of two sets of Gaussians, each (mean, logvar)."""
    return _density_path(gaussians[0]).density(name, gaussians)  # type: ignore[no-any-return]


def density_gradients(name: densities.Name, gaussians: densities.Gaussians, upstream: Tensor) -> densities.Gaussians:
    """Gradients of `sum(upstream * density)` by the four; upstream [N, M]."""
    return _density_path(gaussians[0]).density_gradients(name, gaussians, upstream)  # type: ignore[no-any-return]


_only_pytorch = False


def take_only_pytorch(only: bool) -> None:
    """Have the whole process sweep in PyTorch on every device from now on, or no more: a GPU without its kernel."""
    global _only_pytorch  # noqa: PLW0603  (a property of the process, as the device is)
    _only_pytorch = only


def path_of(values: Tensor) -> ModuleType:
    """The module whose sweeps serve this device and dtype. Raises ValueError where there is none."""
    device = values.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"rows are on {values.device}; there are sweeps for cpu and cuda")
    if device == "cuda" and values.dtype == torch.float32 and not _only_pytorch:
        try:
            from kernels.gaussian_similarity import kernel
        except ImportError as error:
            raise ValueError(f"rows are on {values.device} and Triton cannot be imported: {error}") from error
        log_once(f"Triton kernels on {torch.cuda.get_device_name(values.device)}, same bits every time")
        return kernel
    log_once(f"blocked PyTorch on the {device.upper()} in {values.dtype}")
    return blocked


def _density_path(values: Tensor) -> ModuleType:
    path = path_of(values)
    return densities if path is blocked else path


@cache
def log_once(path: str) -> None:
    """Say which code computes the pairs, the first time that it does."""
    _LOG.info("Gaussian similarity: %s", path)
