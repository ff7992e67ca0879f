"""The base of the model's classes: initialisation, loading and saving."""

from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..configuration.configuration_hf_moe import HfMoeConfig
from ..configuration.saving import PACKAGE
from .dispatch import RAGGED
from .initialisation import MechanismInitialisation
from .loading import (
    check_checkpoint_files,
    check_number_types,
    check_tensors,
    convert_host_names,
    damaged_weights,
    refuse_edited_code,
)


# The group of entry points under which a package names a module that registers methods with PEFT.
PEFT_METHODS = "hf_moe.peft_methods"


class HfMoePreTrainedModel(MechanismInitialisation, PreTrainedModel):
    """Base of the model's classes: initialisation, loading and saving."""

    config: HfMoeConfig
    config_class = HfMoeConfig
    # Transformers greps this file for a decorator to see whether the experts backend can be set; ours read the
    # interface themselves, in another file.
    _can_set_experts_implementation_cached_value = True
    # Objectives may change between two runs; their statistics build up again within a step.
    _keys_to_ignore_on_load_missing = [r"^objectives\."]
    _keys_to_ignore_on_load_unexpected = [r"^objectives\."]

    def __init__(self, config: HfMoeConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(convert_host_names)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        source = pretrained_model_name_or_path
        if source is None:
            return super().from_pretrained(source, *args, **kwargs)
        check_checkpoint_files(source)
        if cls.is_remote_code():
            refuse_edited_code(Path(source))
        wants_report = kwargs.pop("output_loading_info", False)
        ignore_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        # Transformers names a tensor of another shape in a log alone; `check_tensors` names it in the error.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, report = super().from_pretrained(source, *args, **kwargs)
        except SafetensorError as error:
            raise damaged_weights(source, error) from error
        # With an adapter the report is the adapter's, which `load_adapter` has checked.
        if not model._hf_peft_config_loaded:
            # Who asks for the report reads it; everyone else is told by an error.
            if not wants_report:
                check_tensors(source, report, model.can_generate(), ignore_shapes)
            if getattr(model, "hf_quantizer", None) is None:
                own = model.state_dict()
                check_number_types(source, {name for name, tensor in own.items() if tensor.is_floating_point()})
        return (model, report) if wants_report else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        # The names of the modules, which `Trainer` reads back with `load_state_dict`: a host's own names for its
        # files, such as Mixtral's, are undone by `from_pretrained` alone.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        # PEFT knows the methods of other packages, such as LoRA experts, only once they are imported.
        for method in entry_points(group=PEFT_METHODS):
            try:
                method.load()
            except ModuleNotFoundError as error:  # the package is gone, or PEFT is, which Transformers says best
                if error.name not in (method.module, method.module.partition(".")[0], "peft"):
                    raise
        try:
            loaded = super().load_adapter(peft_model_id, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights file (.safetensors) of the adapter {peft_model_id} is damaged or cut short: {error}. "
                "Copy or download it again."
            ) from error
        missing = sorted(key for key in loaded.missing_keys if "_objectives." not in key)
        if missing and peft_model_id is not None:
            raise ValueError(
                f"The weights file of the adapter {peft_model_id} lacks {len(missing)} of its tensors, among them "
                f"{missing[:3]}: it is damaged, or belongs to another adapter_config.json or another base."
            )
        return loaded

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        push = super().push_to_hub if PACKAGE.push is None else partial(PACKAGE.push, self)
        return push(repo_id, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or RAGGED)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        function = kwargs.get("gradient_checkpointing_func")
        if enable and getattr(function, "keywords", {}).get("use_reentrant") and self.config.moe_config.objectives:
            raise ValueError(
                "use_reentrant=True cuts the gradient of the routing objectives "
                f"({', '.join(self.config.moe_config.objectives)}) without a word: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
