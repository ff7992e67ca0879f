"""What the routers of adapters do and what their objectives are worth, among the logs of any `Trainer`."""

from contextlib import suppress
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from ..analysis.routing_statistics import RoutingStatistics
from ..modeling.auxiliary import AuxiliaryLoss, is_learning
from ..modeling.inputs import ModalityUnknown
from ..modeling.routing_context import RoutingContext


class LogRouting(TrainerCallback):
    """Logs `objective/<name>` and `routing/<modality>/<early|middle|late>/<figure>`, as [`HfMoeTrainer`] does.

    The values are those of the last step before a log, the others pay nothing for them; an objective's is before its
    coefficient, the mean over the rows of that step in this process, weighted by their labels. An evaluation during
    training logs `eval_objective/<name>`, a mean over its rows. With several active adapters each name begins with the
    adapter's.

        Trainer(model, arguments, train_dataset=rows, callbacks=[LogRouting()])
    """

    def __init__(self) -> None:
        self._watching = False
        self._handle: Any = None
        # Of an evaluation: every objective's sum over the rows, and how many they are.
        self._evaluated: dict[str, torch.Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        self._objectives: dict[str, dict[str, torch.Tensor]] = {}
        self._labels: dict[str, torch.Tensor] = {}
        self._routing: dict[str, RoutingStatistics] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        # The root whose hooks pass the context: PEFT's wrappers stand around it.
        root = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self._handle is not None:  # of a run that failed
            self._handle.remove()
        self._handle = root.register_forward_hook(self._watch, with_kwargs=True)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._handle.remove()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        self._watching = step == 1 or step % max(int(state.logging_steps), 1) == 0
        self._clear()

    def _watch(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        context: RoutingContext | None = kwargs.get("moe_lora_context")
        if context is not None and not model.training:
            self._evaluate_objectives(context)
        if context is None or not self._watching or not is_learning(model):
            return
        for adapter_name, routing in context.adapters.items():
            if not routing.decisions:
                continue
            with suppress(ModalityUnknown):  # the figures are by modality
                self._routing.setdefault(adapter_name, RoutingStatistics()).update(routing)
            loss: AuxiliaryLoss | None = routing.carry.get("auxiliary_loss")
            if loss is None:
                continue
            self._labels[adapter_name] = self._labels.get(adapter_name, 0) + loss.row_labels.sum()
            sums = self._objectives.setdefault(adapter_name, {})
            for name, value in loss.values.items():
                sums[name] = sums.get(name, 0.0) + (loss.row_labels * value).sum()

    def _evaluate_objectives(self, context: RoutingContext) -> None:
        for adapter_name, routing in context.adapters.items():
            loss: AuxiliaryLoss | None = routing.carry.get("auxiliary_loss")
            for name, value in ({} if loss is None else loss.totals()).items():
                rows = len(context.token_mask)
                sums = torch.stack([rows * value, torch.full_like(value, rows)])
                prefix = f"{adapter_name}/" if len(context.adapters) > 1 else ""
                name = f"{prefix}objective/{name}"
                self._evaluated[name] = self._evaluated.get(name, 0.0) + sums

    def on_predict(self, args: Any, state: TrainerState, control: Any, metrics: Any, **kwargs: Any) -> None:
        self._evaluated = {}

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        figures: dict[str, float] = {}
        measured = next((key.removesuffix("_loss") for key in logs or {} if key.endswith("_loss")), None)
        if measured is not None:
            for name, sums in self._evaluated.items():
                figures[f"{measured}_{name}"] = round(float(sums[0] / sums[1]), 6)
            self._evaluated = {}
        elif logs is None or "loss" not in logs:
            return
        for adapter_name, statistics in self._routing.items() if measured is None else ():
            prefix = f"{adapter_name}/" if len(self._routing) > 1 else ""
            for name, total in self._objectives.get(adapter_name, {}).items():
                mean = total / self._labels[adapter_name].clamp(min=1)
                figures[f"{prefix}objective/{name}"] = round(float(mean), 6)
            for name, value in statistics.figures().items():
                figures[f"{prefix}routing/{name}"] = round(value, 4)
        logs.update(figures)  # type: ignore[union-attr]
        # Written before the callbacks are called.
        state.log_history[-1].update(figures)
