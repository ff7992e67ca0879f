"""The config of a host that is put together from a decoder, a vision tower and a connector."""

from dataclasses import field

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import AutoConfig

from .checks import Interval, strict, within


@strict
class ComposedConfig(PreTrainedConfig):
    r"""
    Tower, connector and decoder: the host of an [`HfMoeConfig`] without a `host_type`.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any decoder that `AutoModel` knows. A small Llama when absent.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Any vision tower that `AutoModel` knows, timm included. `None` builds a model of text alone.
        connector (`dict`, defaults to `{"name": "mlp"}`):
            The module between tower and decoder, with its options.
        image_token_id (`int`, *optional*):
            Id of the placeholder that is replaced by image features; needed when there is a vision tower.
        video_token_id, audio_token_id (`int`, *optional*):
            Placeholders of further modalities; only used to tell their tokens apart.
        image_seq_length (`int`, *optional*):
            Placeholders per image. Derived from the tower and the connector when absent.
        vision_feature_layer (`int`, *optional*):
            Index into the tower's hidden states; `None` takes its last hidden state.
        vision_feature_size (`int`, *optional*):
            Width of a feature of the tower. Derived when absent: a tower's type does not always tell.
        vision_prefix_tokens (`int`, *optional*):
            Leading tokens of the tower's output that are no patches (class and register tokens), dropped. Derived
            when absent.
        image_size (`int`, *optional*):
            Side of the square input image in pixels. Derived from the tower's config when absent.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights of connector, routers and experts.
        tie_word_embeddings (`bool`, defaults to `False`):
            Share the weights of the token embeddings and the head. `True` whenever the decoder's own config says so.
    """

    model_type = "hf_moe_composed"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="llama",
            init_kwargs={
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
            },
        ),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    connector: dict | str = field(default_factory=lambda: {"name": "mlp"})
    image_token_id: int | None = within(Interval(0))
    video_token_id: int | None = within(Interval(0))
    audio_token_id: int | None = within(Interval(0))
    image_seq_length: int | None = within(Interval(1))
    vision_feature_layer: int | None = None
    vision_feature_size: int | None = within(Interval(1))
    vision_prefix_tokens: int | None = within(Interval(0))
    image_size: int | None = within(Interval(1))
    initializer_range: float | int = within(Interval(0), default=0.02)
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.connector = {"name": self.connector} if isinstance(self.connector, str) else self.connector
        if not isinstance(self.connector.get("name"), str):
            raise ValueError(f"connector needs a 'name', for example {{'name': 'mlp'}}; got {self.connector!r}.")
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        if self.image_size is None and self.vision_config is not None:
            size = getattr(self.vision_config, "image_size", None)
            self.image_size = size[0] if isinstance(size, list | tuple) else size
        self._check_placeholders()

    def _check_placeholders(self) -> None:
        """Refuse a tower without a placeholder, and one placeholder for two modalities."""
        if self.vision_config is not None and self.image_token_id is None:
            raise ValueError(
                "A model with a vision tower needs image_token_id, the id of the placeholder that image features "
                "replace: set it, or leave vision_config out."
            )
        ids = {name: getattr(self, name) for name in ("image_token_id", "video_token_id", "audio_token_id")}
        given = {name: value for name, value in ids.items() if value is not None}
        if len(set(given.values())) < len(given):
            raise ValueError(f"Every modality needs a placeholder of its own, got {given}.")
