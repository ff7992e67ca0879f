"""Writes the model card of an adapter folder: what it adapts, what was measured, how it was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from ..configuration.systems import load_system
from .adapter_folder import auto_class, has_own_code, is_adapter
from .card import card_template, eval_results, write_readme
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

    What the report does not hold is left out.

    Args:
        folder (`str` or `Path`): the adapter has been saved to it.
        model (`Any`): the `PeftModel` that was saved.
        report (`dict[str, Any]`): as for [`~hf_moe.hub.card.write_card`], and `trainable_parameters` by part,
            `base_accuracy` and `base_accuracy_by_question_type`, the scores of the base without the adapter.
        recipe (`dict[str, Any]`, *optional*): the training job as plain data, *optional*; the adapter takes its
            `name`, else that of the folder.
        base_models (`Sequence[str]`, *optional*, defaults to `()`): ids of the base on the Hub; what the adapter's
            config records where there are none.
        datasets (`Sequence[str]`, *optional*, defaults to `()`): what the adapter was trained on; the results are
            listed under the first one.
        license (`str`, *optional*, defaults to `'apache-2.0'`): of the weights, an identifier of the Hub; `None` where
            it is not known.
        language (`str` or `Sequence[str]`, *optional*, defaults to `()`): codes of the languages of the data, such as
            `"en"`.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        ImportError: if jinja2 is not installed.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise FileNotFoundError(f"{folder} holds no adapter_config.json: save the adapter there first.")
    template = card_template("adapter_card.md.jinja")
    report = write_evaluation(folder, report, datasets)
    config = model.active_peft_config
    bases = list(base_models) or [config.base_model_name_or_path]
    task = pipeline_tag(model.get_base_model().config)
    metadata = ModelCardData(
        model_name=recipe["name"] if recipe else folder.resolve().name,
        library_name="peft",
        pipeline_tag=task,
        tags=["lora", "moe", "hf_moe"],
        license=license,
        language=[language] if isinstance(language, str) else list(language) or None,
        base_model=bases,
        base_model_relation="adapter",
        datasets=list(datasets) or None,
        eval_results=eval_results(report, datasets, task),
    )
    targets = config.target_modules or config.target_parameters or []
    system = (recipe or {}).get("adapter", {}).get("system")
    text = template.render(
        metadata=metadata.to_yaml(),
        name=metadata.model_name,
        folder=folder.resolve().name,
        base=bases[0],
        auto_class=auto_class(type(model.get_base_model()).__name__) or "AutoModelForCausalLM",
        trust=", trust_remote_code=True" if has_own_code(type(model.get_base_model()).__module__) else "",
        processor_class=auto_processor(model.get_base_model().config),
        config=config,
        system=load_system(system) if system else None,
        targets=[targets] if isinstance(targets, str) else sorted(targets),
        report=report,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else None,
        datasets=datasets,
    )
    return write_readme(folder, text)
