"""Gates and everything else take turns in training: block coordinate descent by epochs.

A mixture whose gate is trained with its experts may settle on a favourite. Here routers learn in one epoch of every
few, the G steps, and all other parameters in those before, the F steps; what does not learn needs no gradient.
`mae_attentive_experts` draws one expert for each row while its gate does not learn.

    Trainer(model, args, train_dataset=rows, callbacks=[AlternatingGates(model)])

Source: A Mixture of h - 1 Heads is Better than h Heads, arXiv:2005.06537.
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..modeling.parts import host_parts, part_of


class AlternatingGates(TrainerCallback):
    """Freezes the routers of a model, or all else that was trainable, as epochs begin.

    Args:
        model (`nn.Module`): what is trained, with the parameters that may learn.
        gate_epoch_every (`int`, *optional*, defaults to 5): the last of so many epochs trains the routers.

    Raises:
        ValueError: if fewer than two epochs take turns, or the model has no routers that may learn.
    """

    def __init__(self, model: nn.Module, gate_epoch_every: int = 5):
        parts = host_parts(model)
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.gates = [parameter for name, parameter in learning.items() if part_of(name, parts) == "routers"]
        self.others = [parameter for name, parameter in learning.items() if part_of(name, parts) != "routers"]
        if gate_epoch_every < 2:
            raise ValueError(f"gate_epoch_every={gate_epoch_every} leaves no epoch for all else: give 2 or more.")
        if not self.gates:
            raise ValueError(f"{type(model).__name__} has no routers that learn: choose a system with routers.")
        self.gate_epoch_every = gate_epoch_every

    def train(self, gates: bool) -> None:
        """Let the routers learn, or everything else."""
        for parameter in self.gates:
            parameter.requires_grad_(gates)
        for parameter in self.others:
            parameter.requires_grad_(not gates)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train(gates=round(state.epoch) % self.gate_epoch_every == self.gate_epoch_every - 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in (*self.gates, *self.others):
            parameter.requires_grad_(True)
