"""Several views of a study to one vector: gated attention (Ilse et al. 2018, arXiv 1802.04712).

Letters: V = images, B = studies, D = width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.models.transformer import Linear


class GatedViewPool(nn.Module):
    """a_k = softmax over a study's views of w [tanh(V x_k) * sigmoid(U x_k)]; the study is the sum of a_k x_k.

    Any number of views in any order. A study's vector depends on its own views alone, and one view is returned as it
    is. In fp32: a softmax of few numbers is where bf16 would be seen.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.content = Linear(width, width)
        self.gate = Linear(width, width)
        self.score = Linear(width, 1, bias=False)

    def forward(self, x: Tensor, study_index: Tensor, studies: int) -> Tensor:
        """`x [V, D]`, `study_index [V]` int64 in 0 .. studies - 1 -> `[studies, D]` fp32; zero without any view."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self._shares(x, study_index, studies) @ x

    def shares(self, x: Tensor, study_index: Tensor, studies: int) -> Tensor:
        """`[studies, V]` fp32: how much of each study is each view; a study's row adds up to 1."""
        with torch.autocast(x.device.type, enabled=False):
            return self._shares(x.float(), study_index, studies)

    def _shares(self, x: Tensor, study_index: Tensor, studies: int) -> Tensor:
        scores = self.score(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x))).squeeze(1)  # [V]
        member = study_index[None, :] == torch.arange(studies, device=x.device)[:, None]  # [B, V]
        # A study without views would be a softmax over nothing; it takes all of them and then none.
        seen = member | ~member.any(dim=1, keepdim=True)
        return scores.masked_fill(~seen, -torch.inf).softmax(dim=1) * member
