"""`Trainer` with eyes: it logs the objectives by name and what the routers do.

The losses need nothing from here: they live in the model, and plain `Trainer` trains it as well.
"""

import inspect
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..analysis.routing_statistics import RoutingStatistics
from ..data import VisionLanguageCollator
from ..evaluation.report import machine, versions
from ..hub.adapter_folder import check_base
from ..hub.card import write_card
from ..hub.push import PushResult, push_checkpoint
from ..modeling.base import HfMoePreTrainedModel
from ..modeling.parts import host_parts
from .parts import selects


class HfMoeTrainer(Trainer):
    """Logs, beside the loss, `objective/<name>` and `routing/<modality>/<early|middle|late>/<figure>`.

    An objective's value is its label-weighted mean over the steps since the last log. The routing figures come from
    the last step before a log, so the other steps pay nothing for them. An evaluation logs `eval_objective/<name>`, a
    mean over its rows, beside `eval_loss`, the language loss alone. Also moves the model's `training_progress`, which
    schedules in routers read.

    Two arguments whose defaults do not go with images are set for a [`VisionLanguageCollator`]:
    `remove_unused_columns` to `False`, since it reads columns that the model does not, and for a streamed data set
    `dispatch_batches` to `False`, since a batch of B rows and N images cannot be cut along its first dimension.

    On several processes a host of Transformers trains with `ddp_find_unused_parameters`, unless the arguments say
    otherwise: its towers get no gradient in a batch of text alone, and some have parameters that never get one.

    Args:
        learning_rate_scales: factors on the learning rate of parts of the model, named as in [`train_only`].
    """

    def __init__(self, *args: Any, learning_rate_scales: dict[str, float] | None = None, **kwargs: Any):
        self.learning_rate_scales = learning_rate_scales or {}
        given = inspect.signature(Trainer.__init__).bind_partial(self, *args, **kwargs).arguments
        if isinstance(given.get("data_collator"), VisionLanguageCollator) and given.get("args") is not None:
            given["args"].remove_unused_columns = False
            config = given["args"].accelerator_config
            if config.dispatch_batches is None and isinstance(given.get("train_dataset"), IterableDataset):
                config.dispatch_batches = False
        hosted = getattr(getattr(given.get("model"), "config", None), "host_type", None) is not None
        if hosted and given.get("args") is not None and given["args"].ddp_find_unused_parameters is None:
            given["args"].ddp_find_unused_parameters = True
        super().__init__(*args, **kwargs)
        self._objective_sums: dict[str, torch.Tensor] = {}
        self._objective_steps = 0
        # Of an evaluation: every objective's sum over the rows, and how many they are.
        self._evaluated: dict[str, torch.Tensor] = {}
        self._routing = RoutingStatistics()
        self._progress_holder = next(m for m in self.model.modules() if hasattr(m, "training_progress"))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        parts = host_parts(self.model)
        for selector, scale in self.learning_rate_scales.items():
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if selects(selector, names[p], parts)]
                if chosen:
                    group["params"] = [p for p in group["params"] if all(p is not other for other in chosen)]
                    optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * scale})
        return optimizer

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._progress_holder.training_progress = self.state.global_step / max(self.state.max_steps, 1)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if not model.training:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self._evaluate_objectives(outputs)
            return (loss, outputs) if return_outputs else loss
        next_step = self.state.global_step + 1
        watch = next_step == 1 or next_step % max(int(self.state.logging_steps), 1) == 0
        loss, outputs = super().compute_loss(model, {**inputs, "output_routing": watch}, return_outputs=True, **kwargs)
        for name, value in (outputs.objective_values or {}).items():
            self._objective_sums[name] = self._objective_sums.get(name, 0.0) + value
        if watch:
            self._routing.update(outputs.routing)
        return (loss, outputs) if return_outputs else loss

    def _evaluate_objectives(self, outputs: Any) -> None:
        rows = len(outputs.logits)
        for name, value in (outputs.objective_values or {}).items():
            sums = torch.stack([rows * value, torch.full_like(value, rows)])
            self._evaluated[name] = self._evaluated.get(name, 0.0) + sums

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, sums in self._evaluated.items():
            total, rows = self.accelerator.gather(sums[None]).sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_objective/{name}"] = round(total / rows, 6)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            steps = max(self.state.global_step - self._objective_steps, 1)
            for name, total in self._objective_sums.items():
                # Every process holds the share of its own labels.
                logs[f"objective/{name}"] = round(self.accelerator.gather(total).sum().item() / steps, 6)
            logs |= {f"routing/{name}": round(value, 4) for name, value in self._routing.figures().items()}
            self._objective_sums, self._objective_steps = {}, self.state.global_step
            self._routing = RoutingStatistics()
        super().log(logs, *args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        for peft_config in getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values():
            check_base(peft_config.base_model_name_or_path)
        super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> PushResult | Any:
        """Upload a complete checkpoint in one commit, as `hf-moe push` does, and nothing of the trainer's own files.

        The results of the card are `eval_accuracy` and `train_runtime`, as logged last.

        Args:
            blocking: of no effect, the checks and the commit are made before this returns.
            card: `datasets`, `base_models`, `license`, `language` as in [`~hf_moe.hub.card.write_card`].

        Returns:
            What was left on the Hub; `None` on all processes but the first. An adapter goes up as `Trainer` does it.

        Raises:
            FileNotFoundError, ValueError, PushError: as [`~hf_moe.hub.push.push_checkpoint`]; before the repository is
                created where an adapter's base is a folder of this machine.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, HfMoePreTrainedModel):
            return super().push_to_hub(commit_message, blocking, token, revision, private, **card)
        name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / name.split("/")[-1]
            self.save_model(str(folder), _internal_call=True)
            if not self.is_world_process_zero():
                return None
            (folder / "training_args.bin").unlink()
            write_card(folder, model=model, report=self._measured(), **card)
            return push_checkpoint(
                folder,
                name,
                private=self.args.hub_private_repo if private is None else private,
                revision=revision if revision is not None else self.args.hub_revision,
                token=token or self.args.hub_token,
                message=commit_message or "End of training",
            )

    def _measured(self) -> dict[str, Any]:
        logged: dict[str, Any] = {}
        for entry in self.state.log_history:
            logged |= entry
        names = {"eval_accuracy": "accuracy", "train_runtime": "train_seconds"}
        return {
            **{ours: logged[theirs] for theirs, ours in names.items() if theirs in logged},
            "parameters_total": sum(parameter.numel() for parameter in self.model.parameters()),
            "seed": self.args.seed,
            "versions": versions(),
            "machine": machine(),
        }
