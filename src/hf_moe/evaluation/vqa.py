"""Questions about images, videos and sounds: a model's answers, and how many are right."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeAlias

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from peft import PeftModel
from tqdm.auto import tqdm

from ..adapters import routing_inputs
from ..analysis.routing_statistics import RoutingStatistics
from ..data.chat_template import AnyProcessor
from ..data.collator import VisionLanguageCollator
from ..data.features import FeatureCache
from ..data.host_features import HostFeatures, without_sight
from ..data.messages import text_of
from ..data.placeholders import expands_alone
from ..data.row_images import undecoded
from ..data.rows import describe_row, row_messages, template_options, text_part
from ..data.tokenisation import IGNORE_INDEX, ConversationTokenizer, media_counts
from ..modeling.evaluation_mode import evaluation_mode
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.vision import tower_features
from .scoring import mean_scores, vqa_score


Rows: TypeAlias = Dataset | IterableDataset


@torch.no_grad()
def predict_answers(
    model: HfMoeForConditionalGeneration | PeftModel,
    processor: AnyProcessor,
    rows: Rows,
    *,
    feature_cache: FeatureCache | HostFeatures | None = None,
    batch_size: int = 64,
    candidates: Sequence[str] | None = None,
    generate: bool = False,
    zero_images: bool = False,
    max_new_tokens: int = 8,
    statistics: RoutingStatistics | None = None,
    conditions: Sequence[str] = (),
) -> list[str]:
    """Return the model's answer to every row, whose last assistant turn it does not see.

    Where every candidate is one token, one prefill per question answers it: the likeliest token of the whole
    vocabulary. Otherwise, and with `generate`, answers are generated greedily. A host of Transformers always
    generates, one token where the candidates are, since its own `generate` alone knows its positions.

    Args:
        model (`HfMoeForConditionalGeneration` or `PeftModel`): of this library, or any of Transformers that takes what
            the processor gives.
        candidates (`Sequence[str]`, *optional*): answers that occur; by default those of the rows. They decide how to
            answer, and restrict nothing.
        zero_images (`bool`, *optional*, defaults to `False`): replace the tower's features by zeros, for the score of
            a model that cannot see.
        max_new_tokens (`int`, *optional*, defaults to `8`): of a generated answer, >= 1.
        statistics (`RoutingStatistics`, *optional*): collects the routing of the prompts; needs the prefill.
        conditions (`Sequence[str]`, *optional*, defaults to `()`): names of what routers of an adapter read of a row,
            see [`VisionLanguageCollator`].

    Raises:
        ValueError: if there are no rows, or `statistics` are asked for and the answers must be generated.
    """
    collator = VisionLanguageCollator(processor, feature_cache=feature_cache, train=False, conditions=conditions)
    rows = undecoded(rows)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("There are no rows to answer.")
    if candidates is None:
        candidates = sorted({answer for answers in check_references(rows) for answer in answers})
    is_single = not generate and _are_single_tokens(candidates, first, processor)
    if not is_single and statistics is not None:
        raise ValueError("Routing statistics come from the prefill; these answers are of several tokens, generated.")
    hosted = expands_alone(processor)
    answers: list[str] = []
    count = len(rows) if isinstance(rows, Dataset) else None
    # Of a single batch a bar tells nothing.
    hidden = count is not None and count <= batch_size
    with evaluation_mode(model), tqdm(total=count, desc="Answering", unit="question", disable=hidden) as progress:
        for batch_rows in batches(rows, batch_size):
            batch = _on_device(collator(batch_rows), model)
            if zero_images:
                batch = without_sight(model, batch) if hosted else _without_sight(model, batch)
            with routing_inputs(**{name: batch.pop(f"{name}_ids") for name in conditions}):
                if is_single and not hosted:
                    tokens = _prefill(model, batch, statistics)
                else:
                    length = 1 if is_single else max_new_tokens
                    tokens = _generate(model, batch, length, processor.tokenizer.pad_token_id, statistics)
            answers += [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            progress.update(len(batch_rows))
    return answers


def evaluate_vqa(
    model: HfMoeForConditionalGeneration | PeftModel, processor: AnyProcessor, rows: Rows, **options: Any
) -> dict[str, Any]:
    """Score the model's answers by VQA accuracy.

    The right answers of a row are its `answers` (of several humans), its `answer`, or its last assistant turn.

    Args:
        options: those of [`predict_answers`].

    Returns:
        `accuracy` (0 to 1), `accuracy_by_question_type` (empty without a column `question_type`), `count` and
        `predictions`.
    """
    predictions = predict_answers(model, processor, rows, **options)
    rows = undecoded(rows)
    scores = [vqa_score(*pair) for pair in zip(predictions, check_references(rows), strict=True)]
    question_types = [row["question_type"] for row in rows] if "question_type" in (rows.column_names or ()) else None
    result = {"accuracy_by_question_type": {}, **mean_scores(scores, "accuracy", question_types)}
    return {**result, "predictions": predictions}


def check_references(rows: Rows | list[dict[str, Any]]) -> list[list[str]]:
    """Return the right answers of every row; an error names the first that has none."""
    references = []
    for index, row in enumerate(rows if isinstance(rows, list) else undecoded(rows)):
        try:
            references.append(reference_answers(row))
        except ValueError as error:
            raise ValueError(f"{describe_row(row, index, 'dataset')}: {error}") from error
    return references


def reference_answers(row: dict[str, Any]) -> list[str]:
    """Return the right answers of a row, as text."""
    for name in ("answers", "answer"):
        given = row.get(name)
        if given is not None and given != []:
            return [text_of(answer, "answer") for answer in (given if isinstance(given, list) else [given])]
    messages = row_messages(row)
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("A row to be scored needs a column answer or answers, or an assistant turn at its end.")
    return ["".join(part["text"] for part in messages[-1]["content"])]


def batches(rows: Rows, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in lists of `batch_size`."""
    remaining: Iterator[dict[str, Any]] = iter(rows)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def _are_single_tokens(candidates: Sequence[str], row: dict[str, Any], processor: AnyProcessor) -> bool:
    """Tell whether each candidate, as the answer to `row`, is one token right after the prompt."""
    tokenizer = processor.tokenizer
    counts = media_counts(row)
    messages, template = row_messages(row), template_options(row)
    prompt, _ = ConversationTokenizer(processor, train=False)(messages, counts, template)
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    trained = ConversationTokenizer(processor)
    special = set(tokenizer.all_special_ids)
    for candidate in candidates:
        turn = {"role": "assistant", "content": [text_part(candidate)]}
        input_ids, labels = trained([*messages, turn], counts, template)
        answer = [label for label in labels[len(prompt) :] if label != IGNORE_INDEX and label not in special]
        if input_ids[: len(prompt)] != prompt or len(answer) != 1:
            return False
    return True


def _on_device(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the batch where the model is, without the modality ids that a host of another kind does not take."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "mm_token_type_ids" not in inspect.signature(base.forward).parameters:
        batch.pop("mm_token_type_ids", None)
    return {name: send_to_device(value, model.device) for name, value in batch.items()}


def _generate(
    model: Any, batch: dict[str, Any], max_new_tokens: int, pad_id: int | None, statistics: RoutingStatistics | None
) -> torch.Tensor:
    """Return the tokens of greedy answers, (B, N)."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": pad_id}
    with ExitStack() as hooks:
        if statistics is not None:
            hooks.enter_context(model.register_forward_pre_hook(_ask_for_routing, with_kwargs=True))
            hooks.enter_context(model.register_forward_hook(lambda _, args, out: statistics.update(out.routing)))
        return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def _ask_for_routing(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "output_routing": True}


def _prefill(model: Any, batch: dict[str, Any], statistics: RoutingStatistics | None) -> torch.Tensor:
    """Return the likeliest next token of every row, (B, 1)."""
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    options = {} if statistics is None else {"output_routing": True}
    outputs = model(**batch, position_ids=position_ids, logits_to_keep=1, use_cache=False, **options)
    if statistics is not None:
        statistics.update(outputs.routing)
    return outputs.logits.argmax(-1)


def _without_sight(model: HfMoeForConditionalGeneration, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with the features of a tower that sees nothing."""
    batch = dict(batch)
    packed = {name: batch.pop(name) for name in ("pixel_attention_mask", "spatial_shapes") if name in batch}
    features = batch.pop("image_features", None)
    if "pixel_values" in batch:
        features = tower_features(model.base_model.vision_tower, model.config, batch.pop("pixel_values"), **packed)
    if features is not None:
        mask = packed.get("pixel_attention_mask")
        connected = model.get_image_features(image_features=torch.zeros_like(features), pixel_attention_mask=mask)
        batch["mm_encoder_outputs"] = {"image": connected}
    return batch
