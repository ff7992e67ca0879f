"""Token- and task-wise mixtures: two mixtures side by side, each for half of the output, and one of them by the task.

    y = [sum_{i in S} w_i A_i(x), sum_{j in S'} v_j B_j(x)] + shared(x)        A_i, B_j: d -> d / 2

S and w come from the router, such as `t2mir` with its balance loss; S' and v are the K largest of softmax(g(x)) with
g = W2 tanh(W1 x), without noise and without balance, divided by their sum. In training the task of a row teaches g:

    q_r = the mean of softmax(g(x)) over the real tokens of row r
    p_c = the mean over the rows of task c of the same, by a slow copy of g
    loss of row r = -log( exp(q_r W p_c(r)) / sum_c exp(q_r W p_c) )        W (E, E), starts as the identity

p_c are those of the last optimizer step that held the task, and the sum is over the tasks that have been seen; so rows
and micro-batches do not depend on each other, and no pairs need to be built. The slow copy moves by a share `tau` to g
after every step and has no gradient. The loss is the signal `task_contrast` (T,) for the objective `signal`: 0 for a
row whose task has not been seen, in a call without tasks, where fewer than two tasks have been seen, and at inference,
where g alone decides and no token depends on another.

The experts are two banks, `token` and `task`, and the decisions those of the sites `1` and `"1.task"`.

Source: Mixture-of-Experts Meets In-Context Reinforcement Learning, arXiv:2506.05426.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.checks import PositiveInt, Share
from ..block import Block, Parts
from ..decisions import ExpertAssignment
from ..gating import assign, gate_logits
from ..layer_spec import MoELayerSpec
from ..registry import register_block
from ..routing import Router, at_least_float32
from ..routing_context import RoutingContext
from ..running_statistics import finite, sum_over_ranks
from ..tanh_gate import TanhGate


BANKS = ("token", "task")


class TaskGate(TanhGate):
    """The gate of the task-wise mixture; its arguments are those of the block."""

    mechanism_name = "t2mir"
    keys: torch.Tensor
    sums: torch.Tensor
    slow_in: torch.Tensor
    slow_out: torch.Tensor

    def __init__(self, spec: MoELayerSpec, condition: str, num_tasks: int, tau: float):
        super().__init__(spec, "t2mir")
        self.condition, self.num_conditions = condition, num_tasks
        self.tau = tau
        self.bilinear = nn.Parameter(torch.empty(spec.num_experts, spec.num_experts))  # W
        for name in ("slow_in", "slow_out"):
            like = getattr(self, name.replace("slow", "gate"))
            self.register_buffer(name, torch.empty(like.shape, dtype=torch.float32))
        # p_c, 0 for a task that has not been seen; of the current step the sums of its rows and, last, their number.
        self.register_buffer("keys", torch.empty(num_tasks, spec.num_experts, dtype=torch.float32))
        self.register_buffer("sums", torch.empty(num_tasks, spec.num_experts + 1, dtype=torch.float32))

    def initialize(self, std: float) -> None:
        super().initialize(std)
        init.eye_(self.bilinear)
        init.copy_(self.slow_in, self.gate_in)
        init.copy_(self.slow_out, self.gate_out)
        init.zeros_(self.keys)
        init.zeros_(self.sums)

    def idle_parameters(self) -> int:
        return self.bilinear.numel()

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        logits = self.gate(hidden_states)  # (T, E)
        assignment = assign(logits, self.spec, context, masked=False)
        # No balance loss is to read them.
        probs, assignment.router_probs = logits.softmax(-1), None
        # Without tasks W still has a gradient, of zeros, which data parallelism waits for.
        value = 0.0 * self.bilinear.sum()[None]
        if self.training and self.condition in (context.condition_ids or {}):
            value = self.contrast(probs, hidden_states, context)  # (B,)
        assignment.signals["task_contrast"] = value.repeat_interleave(len(probs) // len(value))
        return assignment

    def contrast(self, probs: torch.Tensor, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return the loss of every row, (B,), and leave the sums of its task for the end of the step."""
        task = context.row_condition(str(self.condition), probs.device)
        if task is None:
            raise ValueError(
                f"The block 't2mir' contrasts the tasks of rows, and condition_ids[{self.condition!r}] names one for "
                "every token: give it as (B,)."
            )
        query = self.row_means(probs, context)  # (B, E)
        with torch.no_grad():
            slow = gate_logits(gate_logits(hidden_states, self.slow_in).tanh(), self.slow_out).softmax(-1)
            key = self.row_means(slow, context)
            # A row of padding alone is none.
            counted = torch.cat([key, context.token_mask.any(1, keepdim=True).to(key)], -1)
            left = context.carry.setdefault("task_sums", {})
            left[self.spec.site] = torch.zeros_like(self.sums).index_add(0, task, counted)
        seen = self.keys.sum(-1) > 0  # (C,)
        scores = gate_logits(gate_logits(query, self.bilinear.T), self.keys).masked_fill(~seen, float("-inf"))
        counts = seen[task] & (seen.sum() > 1)  # (B,)
        scores = scores.masked_fill(~counts[:, None], 0.0)
        return -scores.log_softmax(-1).gather(1, task[:, None]).squeeze(1).masked_fill(~counts, 0.0)

    def row_means(self, probs: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Return the means of (T, E) over the real tokens of each row, (B, E)."""
        mask = context.token_mask.to(probs.device)  # (B, S)
        total = probs.view(*mask.shape, -1).masked_fill(~mask[..., None], 0.0).sum(1)
        return total / mask.sum(1, keepdim=True).clamp(min=1)

    def accumulate(self, decision: Any, context: RoutingContext) -> None:
        left = context.carry.get("task_sums", {}).get(self.spec.site)
        if left is not None:
            self.sums += finite(sum_over_ranks(left))

    @torch.no_grad()
    def end_step(self) -> None:
        rows = self.sums[:, -1:]  # (C, 1)
        self.keys.copy_(torch.where(rows > 0, self.sums[:, :-1] / rows.clamp(min=1), self.keys))
        self.sums.zero_()
        self.slow_in.lerp_(self.gate_in, self.tau)
        self.slow_out.lerp_(self.gate_out, self.tau)


@register_block("t2mir")
class TokenAndTaskMoE(Block):
    """Two mixtures of half of the output's width each, and the shared branch if the config has one.

    Args:
        spec: facts of the layer; its numbers are those of the token-wise mixture.
        num_task_experts (`int`, *optional*, defaults to E): experts of the task-wise one, of which a token has K too.
        condition (`str`, *optional*, defaults to `"task"`): name of the rows' tasks in the call's `condition_ids`.
        num_tasks (`int`, *optional*, defaults to 8): how many there are.
        tau (`float`, *optional*, defaults to 0.005): see above.

    Raises:
        ValueError: if the output's width is odd, K does not lie in [2, num_task_experts], or the layer has isolated
            banks, which it makes itself; in a training forward, if tokens have tasks of their own.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        parts: Parts,
        *,
        num_task_experts: PositiveInt | None = None,
        condition: str = "task",
        num_tasks: PositiveInt = 8,
        tau: Share = 0.005,
    ):
        super().__init__(spec, parts)
        width = spec.output_size or spec.hidden_size
        if width % 2 or spec.banks:
            raise ValueError(
                f"The block 't2mir' of layer {spec.layer_idx} joins two mixtures of half of the output's width "
                f"{width}, each with experts of its own: give an even width, and leave expert_banks out."
            )
        sizes = (spec.num_experts, num_task_experts or spec.num_experts)
        banks = tuple((name, size, spec.expert_intermediate_size) for name, size in zip(BANKS, sizes, strict=True))
        self.expert_spec = replace(spec, num_experts=sum(sizes), banks=banks, output_size=width // 2)
        task = TaskGate(replace(spec, part="task", num_experts=sizes[1]), condition, num_tasks, tau)
        self.gate = nn.ModuleDict({"token": parts.router(spec), "task": at_least_float32(task)})
        self.experts = parts.experts(self.expert_spec)
        self.shared_expert = parts.shared_expert(spec, self.experts)
        self.residual_mix = parts.residual_mix(spec)

    def experts_of(self, router: int) -> nn.Module:
        return getattr(self.experts, BANKS[router])

    def put_routers(self, routers: list[Router]) -> None:
        # The gate of tasks stays: it is a part of the block.
        super().put_routers([routers[0], self.gate["task"]])

    def mix(self, tokens: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        halves = [
            self.route(gate, self.experts_of(number), tokens, context)[0]
            for number, gate in enumerate(self.gate.children())
        ]
        return self.add_shared(torch.cat(halves, dim=-1), tokens)
