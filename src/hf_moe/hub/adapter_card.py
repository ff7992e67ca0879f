"""Writes the model card of an adapter folder: what it adapts, what was measured, how it was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapter_folder import auto_class, has_own_code, is_adapter
from .card import card_template, write_readme
from .host_facts import auto_processor, pipeline_tag
from .results import write_evaluation


def write_adapter_card(
    folder: str | Path,
    *,
    model: Any,
    report: dict[str, Any],
    recipe: dict[str, Any] | None = None,
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    license: str | None = "apache-2.0",
    language: str | Sequence[str] = (),
) -> Path:
    """Write README.md into the folder of a saved adapter, beside it the evaluation files that its numbers come from.

    The other arguments and the result are those of [`~hf_moe.hub.card.write_card`].

    Args:
        folder (`str` or `Path`): the adapter has been saved to it.
        model (`Any`): the `PeftModel` that was saved.
        report (`dict[str, Any]`): may hold, too, `trainable_parameters` by part, `base_accuracy` and
            `base_accuracy_by_question_type`, the scores of the base without the adapter.
        base_models (`Sequence[str]`, *optional*, defaults to `()`): ids of the base on the Hub; what the adapter's
            config records where there are none.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        ImportError: if jinja2 is not installed.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise FileNotFoundError(f"{folder} holds no adapter_config.json: save the adapter there first.")
    template = card_template("adapter_card.md.jinja")
    report = write_evaluation(folder, report, datasets)
    config, base = model.active_peft_config, model.get_base_model()
    bases = list(base_models) or [config.base_model_name_or_path]
    metadata = {
        "library_name": "peft",
        "tags": ["lora", "moe", "hf_moe"],
        "license": license,
        "language": language,
        "base_model": bases,
        "base_model_relation": "adapter",
    }
    targets = config.target_modules or config.target_parameters or []
    return write_readme(
        folder,
        template,
        pipeline_tag(base.config),
        metadata,
        report=report,
        recipe=recipe,
        datasets=datasets,
        system=(recipe or {}).get("adapter", {}).get("system"),
        base=bases[0],
        auto_class=auto_class(type(base).__name__) or "AutoModelForCausalLM",
        trust=", trust_remote_code=True" if has_own_code(type(base).__module__) else "",
        processor_class=auto_processor(base.config),
        config=config,
        targets=[targets] if isinstance(targets, str) else sorted(targets),
    )
