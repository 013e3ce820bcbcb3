"""Mixtures of experts: `moe`, the paper's baseline, and `moe_topk`, the stronger one.

Shapes: B rows, T tokens per row, N = B*T tokens, D model width, F hidden width of an expert, E experts, K
experts per token, C tokens per expert and row, L tokens per expert (padded).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from suite.models.cost import Cost
from suite.models.feedforward import SwiGLU
from suite.models.precision import at_least_fp32
from suite.models.ranking import best
from suite.models.registry import Family, ModelConfig, Problem, register

PAPER_EXPERTS = {"134m": 16, "373m": 8, "720m": 6, "1.3b": 4}
"""Experts in the paper: the fewest that exceed the parameters of its "Memory" row."""
OTHER_EXPERTS = 8


def tally(expert: Tensor, experts: int) -> Tensor:
    """Return how often each expert occurs, [E] int64; like torch.bincount, but also on the meta device."""
    return torch.zeros(experts, dtype=torch.int64, device=expert.device).index_add_(0, expert, torch.ones_like(expert))


class Experts(nn.Module):
    """E SwiGLUs, each applied to its own tokens.

    `busiest` is the load of the busiest expert relative to the mean load. It is used on the meta device only, where
    routing has no values to count.
    """

    matrices: ClassVar[tuple[str, ...]] = ("w1", "w2", "w3")
    busiest = 1.0

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.count = experts
        self.w1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, dim))

    def forward(self, x_ELD: Tensor) -> Tensor:
        h_ELF = F.silu(x_ELD @ self.w1.mT) * (x_ELD @ self.w3.mT)
        return h_ELF @ self.w2.mT

    def routed(self, x_ND: Tensor, expert_NK: Tensor) -> Tensor:
        """Return each token's outputs of its K experts, [N, K, D]; experts are int64 in [0, E).

        Tokens are grouped by expert and padded to the count of the busiest expert, so that one batched product serves
        all. Padding repeats token 0, and its results are discarded.
        """
        expert = expert_NK.flatten()
        order = expert.argsort(stable=True)
        counts_E = tally(expert, self.count)
        longest = math.ceil(self.busiest * len(expert) / self.count) if expert.is_meta else int(counts_E.max())
        rank = torch.arange(len(expert), device=expert.device)
        within = rank - (counts_E.cumsum(0) - counts_E)[expert[order]]
        place = torch.empty_like(expert)
        place[order] = expert[order] * longest + within
        token = torch.zeros(self.count * longest, dtype=torch.int64, device=expert.device)
        token[place] = rank // expert_NK.shape[1]
        y_ELD = self(x_ND.index_select(0, token).view(self.count, longest, -1))
        return y_ELD.flatten(0, 1).index_select(0, place).view(*expert_NK.shape, -1)

    def cost(self, active: int) -> Cost:
        """Count all experts; each token reads the weights of `active` ones."""
        weights = self.w1.numel() + self.w2.numel() + self.w3.numel()
        read = weights * active // self.count
        return Cost({"experts": weights}, {"experts": read}, {"ffn": read})


class Router(nn.Linear):
    """One logit per expert, without bias, and in fp32 even if the model computes in bf16."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__(dim, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            wide = at_least_fp32(x.dtype)
            return F.linear(x.to(wide), self.weight.to(wide))

    def cost(self) -> Cost:
        """Count one dense matrix."""
        weights = self.weight.numel()
        return Cost({"router": weights}, {"router": weights}, {"router": weights})


class ExpertChoice(nn.Module):
    """The paper's mixture: full-size experts choose tokens in training; in evaluation, tokens use their best expert.

    Zhou et al. 2022 (arXiv 2202.09368). "Memory Layers at Scale" states neither capacity nor pool. Our choices: the
    gate is the softmax over experts, the pool is one row, the capacity factor is 1 (ceil(T / E) tokens per expert), and
    tokens that no expert chooses pass through the residual alone. In training the choice depends on later tokens; in
    evaluation it does not.
    """

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = Router(dim, experts)
        self.experts = Experts(experts, dim, hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTE = self.router(x_BTD).softmax(dim=-1)
        return self._experts_choose(x_BTD, gate_BTE) if self.training else self._best_expert(x_BTD, gate_BTE)

    def _experts_choose(self, x_BTD: Tensor, gate_BTE: Tensor) -> Tensor:
        rows, tokens, dim = x_BTD.shape
        capacity = -(-tokens // self.experts.count)
        # Ties are common (equal tokens at the start of documents); the earlier token wins in every process.
        gate_BET = gate_BTE.transpose(1, 2)
        position_BEC = best(gate_BET.detach(), capacity)
        gate_BEC = gate_BET.gather(-1, position_BEC)
        first_B = torch.arange(rows, device=x_BTD.device) * tokens
        position = (position_BEC + first_B[:, None, None]).transpose(0, 1).flatten()
        x_ELD = x_BTD.flatten(0, 1).index_select(0, position).view(self.experts.count, rows * capacity, dim)
        y_ELD = self.experts(x_ELD) * gate_BEC.transpose(0, 1).flatten(1).unsqueeze(-1)
        y_ND = torch.zeros(rows * tokens, dim, dtype=y_ELD.dtype, device=x_BTD.device)
        return y_ND.index_add(0, position, y_ELD.flatten(0, 1)).view_as(x_BTD).to(x_BTD.dtype)

    def _best_expert(self, x_BTD: Tensor, gate_BTE: Tensor) -> Tensor:
        gate_N1, expert_N1 = gate_BTE.flatten(0, 1).max(dim=-1, keepdim=True)
        y_ND = self.experts.routed(x_BTD.flatten(0, 1), expert_N1).squeeze(1) * gate_N1
        return y_ND.view_as(x_BTD).to(x_BTD.dtype)

    def cost(self) -> Cost:
        """Count top-1 routing, which is also the mean of expert choice at capacity 1."""
        return self.router.cost() + self.experts.cost(active=1)


class TokenChoice(nn.Module):
    """Many small experts; each token uses its best K. Load is balanced without an auxiliary loss.

    Affinities are sigmoids, normalised over the chosen experts (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16). A
    bias per expert, used only for the choice, moves by `balance_rate` after each step, up for experts that received
    fewer tokens than the mean (Wang et al. 2024, arXiv 2408.15664, algorithm 1). `load_E` counts tokens since the last
    step; processes that share a batch must sum it before `after_step`.
    """

    balance_E: Tensor
    load_E: Tensor

    def __init__(
        self, dim: int, hidden: int, experts: int, top_k: int, shared_hidden: int, balance_rate: float
    ) -> None:
        super().__init__()
        self.top_k, self.balance_rate = top_k, balance_rate
        self.router = Router(dim, experts)
        self.experts = Experts(experts, dim, hidden)
        self.shared = SwiGLU(dim, shared_hidden) if shared_hidden else None
        self.register_buffer("balance_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        affinity_NE = self.router(x_ND).sigmoid()
        expert_NK = (affinity_NE + self.balance_E).topk(self.top_k).indices
        if self.training:
            self.load_E += tally(expert_NK.flatten(), self.experts.count)
        gate_NK = affinity_NE.gather(-1, expert_NK)
        gate_NK = gate_NK / gate_NK.sum(dim=-1, keepdim=True)
        y_ND = (self.experts.routed(x_ND, expert_NK) * gate_NK.unsqueeze(-1)).sum(dim=1).to(x_BTD.dtype)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the balancing bias and reset the counts."""
        self.balance_E += self.balance_rate * torch.sign(self.load_E.mean() - self.load_E)
        self.load_E.zero_()

    def cost(self) -> Cost:
        """Count the chosen experts and the shared one."""
        shared = Cost() if self.shared is None else self.shared.cost()
        return self.router.cost() + self.experts.cost(self.top_k) + shared


class MoEConfig(ModelConfig):
    """`moe`: every feed-forward replaced by full-size experts."""

    experts: int | None = Field(default=None, gt=1, description="experts per layer; None: the paper's, else 8")

    @property
    def expert_count(self) -> int:
        """Number of experts per layer."""
        return self.experts or PAPER_EXPERTS.get(self.base, OTHER_EXPERTS)


class MoETopKConfig(ModelConfig):
    """`moe_topk`: by default 8 of 64 experts per token (laptop bases: 4 of 16), as wide together as the dense layer."""

    experts: int | None = Field(default=None, gt=1, description="experts per layer; None: 64, laptop sizes 16")
    top_k: int | None = Field(
        default=None, gt=0, description="experts per token besides shared; None: 8, laptop sizes 4"
    )
    expert_hidden: int | None = Field(
        default=None, gt=0, description="width; None: ffn_hidden // (top_k + shared_experts)"
    )
    shared_experts: int = Field(default=0, ge=0, description="experts that every token uses")
    balance_rate: float = Field(default=1e-3, ge=0, description="step size of the balancing bias")

    @property
    def routing(self) -> tuple[int, int, int]:
        """Experts per layer, routed experts per token, and hidden width of an expert."""
        laptop = not self.size.vocab_size
        experts, top_k = self.experts or (16 if laptop else 64), self.top_k or (4 if laptop else 8)
        return experts, top_k, self.expert_hidden or self.size.ffn_hidden // (top_k + self.shared_experts)

    def family_problems(self) -> list[Problem]:
        experts, top_k, hidden = self.routing
        if top_k > experts:
            return [("top_k", top_k, f"at most experts ({experts})")]
        if hidden == 0:
            return [("top_k", top_k, f"a smaller number, or set expert_hidden: ffn_hidden is {self.size.ffn_hidden}")]
        return []


def expert_choice_feed_forwards(config: MoEConfig) -> list[nn.Module]:
    """Return an expert-choice mixture for every layer."""
    size = config.size
    return [ExpertChoice(size.dim, size.ffn_hidden, config.expert_count) for _ in range(size.layers)]


def token_choice_feed_forwards(config: MoETopKConfig) -> list[nn.Module]:
    """Return a token-choice mixture for every layer."""
    size, (experts, top_k, hidden) = config.size, config.routing
    shared_hidden = config.shared_experts * hidden
    return [
        TokenChoice(size.dim, hidden, experts, top_k, shared_hidden, config.balance_rate) for _ in range(size.layers)
    ]


register(Family("moe", MoEConfig, expert_choice_feed_forwards))
register(Family("moe_topk", MoETopKConfig, token_choice_feed_forwards))
