"""A mixture over the domains of a text, for models whose experts follow a domain that is known in training.

    p(x_t | x_<t) = sum_j p(x_t | x_<t, D = j) p(D = j | x_<t)
    p(D = j | x_<t) = softmax over j of log prior_j + log p(x_<t | D = j)

Every row runs once for each domain, side by side in the batch, each with a cache of its own; predictions are mixed,
not parameters. The posterior at a token has read the tokens before it: the mixture is causal, and does not depend
on other rows of the batch.

Source: DEMix Layers: Disentangling Domains for Modular Language Modeling, arXiv:2108.05036.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from ..modeling.context import routers_of
from ..modeling.inputs import conditions_read
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration


class DomainMixture:
    """Predicts texts of unknown domain.

        mixture = DomainMixture(model)
        mixture.fit_prior(development_batches)
        mixture.generate(input_ids, attention_mask=mask, max_new_tokens=20)

    Args:
        model: whose routers read the condition.
        condition (`str`, *optional*, defaults to `"domain"`): its name.
        top_k (`int`, *optional*): how many domains run, those with the largest prior; all when absent.
        prior_decay (`float`, *optional*): weight of the posterior at the end of a call in a moving average that is
            the prior of the next one, 0.3 in the paper; without, the prior stays as it is.

    Attributes:
        prior (`torch.Tensor` of shape `(J,)`): uniform at first; [`~DomainMixture.fit_prior`] sets it from data.

    Raises:
        ValueError: if no router reads the condition, or a number is out of range.
    """

    def __init__(
        self,
        model: HfMoeForConditionalGeneration,
        *,
        condition: str = "domain",
        top_k: int | None = None,
        prior_decay: float | None = None,
    ):
        read = conditions_read(routers_of(model).values())
        number = read.get(condition, 0)
        if not number:
            raise ValueError(f"No router reads ids of the condition {condition!r}; they read {list(read) or 'none'}.")
        if not 1 <= (top_k or number) <= number or not 0.0 <= (prior_decay or 0.0) <= 1.0:
            raise ValueError(f"top_k={top_k} must lie in [1, {number}], prior_decay={prior_decay} in [0, 1].")
        self.model = model
        self.condition = condition
        self.top_k = top_k or number
        self.prior_decay = prior_decay
        self.prior = torch.full((number,), 1 / number)

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities (B, S, V) of the next token, and what is known of the domain there, (B, S, J).

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`): rows without their domains.
            inputs: of the model, such as `attention_mask` and `pixel_values`.
        """
        mixed, posterior = self._predict(input_ids, inputs)
        if self.prior_decay is not None:
            end = _at_end(posterior, inputs.get("attention_mask")).mean(0)
            self.prior = torch.lerp(self.prior, end.cpu(), self.prior_decay)
        return mixed, posterior

    @torch.no_grad()
    def _predict(self, input_ids: torch.Tensor, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        domains, log_prior = self._domains(input_ids.device)
        rows, repeated = self._repeated(input_ids, inputs, domains)
        logits = self.model(input_ids=rows, **repeated).logits.float()
        log_probs = logits.log_softmax(-1).unflatten(0, (-1, len(domains)))  # (B, J, S, V)
        said = log_probs[:, :, :-1].gather(-1, input_ids[:, None, 1:, None].expand(-1, len(domains), -1, -1))
        said = said.squeeze(-1)  # (B, J, S - 1)
        mask = inputs.get("attention_mask")
        if mask is not None:  # padding, which no expert sees, foretells the first token the same in every domain
            said = said.masked_fill(mask[:, None, 1:] == 0, 0.0)
        evidence = F.pad(said.cumsum(-1), (1, 0))  # (B, J, S): of the tokens up to this one
        log_posterior = (log_prior[:, None] + evidence).log_softmax(1)
        mixed = torch.logsumexp(log_probs + log_posterior[..., None], 1)  # (B, S, V)
        posterior = evidence.new_zeros(*mixed.shape[:2], len(self.prior))
        posterior[..., domains] = log_posterior.exp().transpose(1, 2)
        return mixed, posterior

    def fit_prior(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Set the prior to the mean posterior at the end of the rows of `batches`, a hundred rows in the paper."""
        self.prior = torch.full_like(self.prior, 1 / len(self.prior))
        ends = []
        for batch in batches:
            inputs = dict(batch)
            _, posterior = self._predict(inputs.pop("input_ids"), inputs)
            ends.append(_at_end(posterior, inputs.get("attention_mask")))
        self.prior = torch.cat(ends).mean(0).cpu()

    def generate(self, input_ids: torch.Tensor, *, do_sample: bool = False, **kwargs: Any) -> torch.Tensor:
        """Return the rows (B, S') with what the mixture writes after them, greedily or sampled.

        Args:
            kwargs: inputs of the model, and of `generate` what is not about beams.
        """
        domains, _ = self._domains(input_ids.device)
        names = [name for name in kwargs if isinstance(kwargs[name], torch.Tensor)]
        inputs = {name: kwargs.pop(name) for name in names}
        _, posterior = self._predict(input_ids, inputs)
        rows, repeated = self._repeated(input_ids, inputs, domains)
        mixing = _MixRows(posterior[:, -1, domains].log(), do_sample)
        processors = LogitsProcessorList([*kwargs.pop("logits_processor", []), mixing])
        found = self.model.generate(rows, **repeated, **kwargs, do_sample=False, logits_processor=processors)
        return found[:: len(domains)]

    def _domains(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the domains that run, (J,), and their log prior (J,)."""
        weight, domains = self.prior.to(device).topk(self.top_k)
        return domains, weight.log()

    def _repeated(
        self, input_ids: torch.Tensor, inputs: Mapping[str, Any], domains: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the rows and inputs of a call, each row once for every domain, which lie together."""
        rows, repeated = self.model._expand_inputs_for_generation(
            expand_size=len(domains), is_encoder_decoder=False, input_ids=input_ids, **inputs
        )
        return rows, {**repeated, "condition_ids": {self.condition: domains.repeat(len(input_ids))}}


class _MixRows(LogitsProcessor):
    """Gives the rows of a text the mixture of what they predict, so that all go on with the same token.

    Args:
        log_posterior (`torch.Tensor` of shape `(B, J)`): of the domains, at the last token of the prompts.
    """

    def __init__(self, log_posterior: torch.Tensor, do_sample: bool):
        self.log_posterior = log_posterior
        self.do_sample = do_sample
        self.predicted: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        number = self.log_posterior.shape[1]
        if self.predicted is not None:
            token = input_ids[:, -1].view(-1, number, 1)
            self.log_posterior = (self.log_posterior + self.predicted.gather(-1, token).squeeze(-1)).log_softmax(1)
        self.predicted = scores.float().log_softmax(-1).view(-1, number, scores.shape[-1])  # (B, J, V)
        mixed = torch.logsumexp(self.predicted + self.log_posterior[..., None], 1)  # (B, V)
        if self.do_sample:
            drawn = torch.multinomial(mixed.exp(), 1)
            mixed = torch.full_like(mixed, float("-inf")).scatter(1, drawn, 0.0)
        return mixed.repeat_interleave(number, 0)


def _at_end(posterior: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the posterior (B, J) at the last real token of every row."""
    if mask is None:
        return posterior[:, -1]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return posterior[torch.arange(len(last), device=last.device), last]
