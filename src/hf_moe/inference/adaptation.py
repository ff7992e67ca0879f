"""Test-time adaptation of an adapter on its own confident outputs.

    loss = cross-entropy of the model's predictions with their argmax, where p > confidence and p >= p of the source
    after each step every adapter weight returns to its source value with probability `restore_prob`

Source: BECoTTA: Input-dependent Online Blending of Experts for Continual Test-time Adaptation, arXiv:2402.08712.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.func import functional_call
from torch.nn import functional as F

from ..modeling.evaluation_mode import evaluation_mode


class TestTimeAdapter:
    """Adapts the trainable weights of a model, its adapter's, to a stream of inputs without labels.

    Args:
        model: a model with an adapter that has been trained.
        learning_rate: of plain Adam.
        confidence: least probability of a prediction to learn from, in [0, 1).
        restore_prob: probability of every weight to return to its source value after a step, in [0, 1].
        seed: of the restoring.

    Raises:
        ValueError: if a number is out of range, or the model trains nothing.
    """

    __test__ = False  # no test of pytest's

    def __init__(
        self,
        model: PeftModel,
        *,
        learning_rate: float = 6e-7,
        confidence: float = 0.69,
        restore_prob: float = 0.01,
        seed: int = 0,
    ):
        if not 0.0 <= confidence < 1.0 or not 0.0 <= restore_prob <= 1.0:
            raise ValueError(f"confidence={confidence} must lie in [0, 1), restore_prob={restore_prob} in [0, 1].")
        self.model = model
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not self.trained:
            raise ValueError("The model has no trainable weight to adapt: set_adapter() one that is not frozen.")
        self.source = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=learning_rate)
        self.confidence = confidence
        self.restore_prob = restore_prob
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, **inputs: Any) -> torch.Tensor:
        """Predict, learn from what the model is sure of, and return the predictions made before (N, classes)."""
        with evaluation_mode(self.model):
            logits = self._real(self.model(**inputs).logits.float(), inputs)
            with torch.no_grad():
                output = functional_call(self.model, self.source, (), inputs)
                reference = self._real(output.logits.float(), inputs).softmax(-1)
                probs = logits.softmax(-1)
                best, label = probs.max(-1)
                sure = (best > self.confidence) & (best >= reference.gather(-1, label[..., None]).squeeze(-1) - 1e-6)
            if sure.any():
                F.cross_entropy(logits[sure], label[sure]).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self._restore()
            return logits.detach()

    @staticmethod
    def _real(logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the logits of real tokens, or of all rows of a classifier, (N, classes)."""
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == logits.shape[:-1]:
            return logits[mask.bool()]
        return logits.flatten(0, -2)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, parameter in self.trained.items():
            chosen = torch.rand(parameter.shape, generator=self.generator).to(parameter.device) < self.restore_prob
            parameter.copy_(torch.where(chosen, self.source[name], parameter))
