"""What a recipe may say: its sections, their fields and types."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, Required, TypedDict

from ..configuration.checks import Interval, NonNegative, NonNegativeInt, Positive, PositiveInt


Seed = Annotated[int, Interval(0, 2**32 - 1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Upcycled(TypedDict, total=False):
    """What both kinds of model may say: MoE layers, what their experts are made of, chat template and precision."""

    system: str | None
    moe_config: dict[str, Any] | None
    vision_moe_config: dict[str, Any] | None
    connector_moe_config: dict[str, Any] | None
    chat_template: str | None
    source: str | dict[str, Any] | None
    noise_std: NonNegative
    dtype: Dtype


class Model(Upcycled, total=False):
    """Arguments of [`build_model`] as YAML has them; `tokenizer: words` trains one on the data's text."""

    language_model: Required[str | dict[str, Any]]
    vision_tower: str | dict[str, Any] | None
    connector: dict[str, Any] | None
    tokenizer: Literal["words"]
    image_token: str
    image_size: PositiveInt | None
    feature_stage: Annotated[int, Interval(0, 4)] | None


class Host(Upcycled, total=False):
    """A model of Transformers that becomes a MoE in place, see [`~hf_moe.HfMoeForConditionalGeneration.from_host`].

    `host` is a Hub id, a folder, or the fields of a config with `model_type`, which give fresh weights. The processor
    is the host's own, unless `processor` names another; fresh weights need one. Weights are float32 by default.
    """

    host: Required[str | dict[str, Any]]
    processor: str
    audio_moe_config: dict[str, Any] | None


class Base(TypedDict, total=False):
    """The frozen model under an adapter, see [`~hf_moe.training.adapter.load_base`]."""

    base: Required[str]
    revision: str | None
    dtype: Dtype


class Data(TypedDict, total=False):
    """Sources of rows, see [`load_rows`]; `max_length` in tokens.

    `keep_features` says whether the features of images are computed once, where what they come from is frozen; it is
    true unless said otherwise.
    """

    train: Required[str | dict[str, Any]]
    eval: str | dict[str, Any] | None
    max_length: PositiveInt | None
    keep_features: bool


class AdapterEvaluation(TypedDict, total=False):
    """Questions per batch, and whether they are scored under autocast."""

    batch_size: PositiveInt
    bf16: bool


class Evaluation(AdapterEvaluation, total=False):
    """Whether to score also with the image features zeroed, and how many questions `generate` answers too."""

    blind: bool
    generated: NonNegativeInt


class Card(TypedDict, total=False):
    """What the card says that the run does not know; identifiers of the Hub."""

    datasets: list[str]
    base_models: list[str]
    license: str | None
    language: str | list[str]


class Evolve(TypedDict, total=False):
    """`layers` as in `moe_config`, and options of [`ExpertEvolution`]."""

    layers: Required[str | list[int]]
    rule: Literal["delta", "ema", "literal"]
    beta_ranges: list[float | list[float]]
    beta_granularity: Literal["step", "tensor", "row"]
    seed: Seed


class Assemble(TypedDict, total=False):
    """The MoE that a dense model becomes: a preset, and fields over it."""

    system: str | None
    moe_config: dict[str, Any]
    vision_moe_config: dict[str, Any]
    audio_moe_config: dict[str, Any]
    connector_moe_config: dict[str, Any]
    seed: Seed


class Upcycle(Assemble, total=False):
    """What the experts are made of besides, and noise on them, relative to the standard deviation of each matrix."""

    source: str | dict[str, Any]
    noise_std: NonNegative


class Construct(TypedDict, total=False):
    """Constructions, in the order in which they are written; see [`construct_stage`]."""

    upcycle: Upcycle
    assemble: Assemble
    convert_router: dict[str, Any]


@dataclass
class Stage:
    """One stage of a training job.

    Args:
        name: of the stage and of its folder.
        trainable: parts that are trained, see [`train_only`]; while experts evolve, `experts` is expert 1.
        training: fields of `TrainingArguments` that override the recipe's.
        construct: what becomes of the previous stage's model before this one: `{upcycle: options}` and, with the
            experts that evolved, `{assemble: options}` make a MoE of a dense model, `{convert_router: options}`
            exchanges the routers; see [`construct`].
        evolve: `layers` and options of [`ExpertEvolution`], for experts that evolve beside the training.
        objectives: replace the model's; empty for none.
        learning_rate_scales: factors on the learning rate, by part as in `trainable`.
        loss: `"cross_entropy"` with the labels, or `"entropy"` of the predictions there, whatever the labels are.
    """

    name: str
    trainable: list[str]
    training: dict[str, Any] = field(default_factory=dict)
    construct: Construct | None = None
    evolve: Evolve | None = None
    objectives: dict[str, Any] | None = None
    learning_rate_scales: dict[str, Positive] = field(default_factory=dict)
    loss: Literal["cross_entropy", "entropy"] = "cross_entropy"


@dataclass
class Recipe:
    """One training job.

    Args:
        name: of the run; the default output folder is `runs/<name>`.
        model: see [`Model`], or [`Host`] for a model of Transformers as it is; for an adapter see [`Base`].
        adapter: the fields of a [`MoeLoraConfig`], or `system`, `variant` and what differs from that preset. The base
            is frozen, and the adapter alone is trained and saved.
        data: see [`Data`].
        training: fields of `TrainingArguments`.
        trainable: parts that are trained, see [`train_only`].
        stages: where the job has several, see [`Stage`]; each takes over the model of the one before.
        evaluation: see [`Evaluation`]; for an adapter see [`AdapterEvaluation`].
        card: see [`Card`].
        seed: of the weights, the data order and the training; 0 to 2^32 - 1.
    """

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    trainable: list[str] = field(default_factory=lambda: ["connector", "routers", "experts", "embeddings", "backbone"])
    stages: list[Stage] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    seed: Seed = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, without what does not apply to it."""
        foreign = ("adapter",) if self.adapter is None else ("trainable", "stages")
        return {name: value for name, value in asdict(self).items() if name not in foreign}


# The sections whose fields depend on what is trained: a model, or an adapter. A `model` with a host is a `Host`.
SECTIONS: dict[str, tuple[Any, Any]] = {
    "model": (Model, Base),
    "data": (Data, Data),
    "evaluation": (Evaluation, AdapterEvaluation),
    "card": (Card, Card),
}
