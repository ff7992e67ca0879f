# Written by hf_moe when this checkpoint was saved; the next save replaces or removes this file.
"""The processor: images and text in, placeholders expanded, modality ids beside the tokens."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .configuration_hf_moe import save_with_hooks


class HfMoeProcessor(ProcessorMixin):
    r"""
    Pairs any image processor with any tokenizer.

    Every `image_token` in the text stands for one image and is expanded to `image_seq_length` placeholders, or to the
    patches the image really has where the tower takes packed patches. The output holds `input_ids`, `attention_mask`,
    `mm_token_type_ids` and the image processor's tensors.

    Args:
        image_processor: the tower's image processor.
        tokenizer: the decoder's tokenizer; it must know `image_token`. Set to pad on the left, as generation needs.
        image_seq_length (`int`, *optional*): placeholders per image: the model config's `image_seq_length`.
        image_token (`str`, defaults to `"<image>"`): the placeholder.
        chat_template (`str`, *optional*): a Jinja template that writes `image_token` where an image stands.

    Raises:
        ValueError: if the tokenizer does not know `image_token`.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
        chat_template: str | None = None,
    ):
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {image_token!r}: add it with tokenizer.add_special_tokens("
                f"{{'additional_special_tokens': [{image_token!r}]}}) and resize the model's embeddings."
            )
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Check that every row has as many images as placeholders.

        Raises:
            ValueError: naming the first row that does not fit, its placeholders and its images.
        """
        if isinstance(images, list) and isinstance(text, list) and all(isinstance(row, list) for row in images):
            for index, (row, sample) in enumerate(zip(images, text, strict=False)):
                found = sample.count(self.image_token)
                if found != len(row):
                    raise ValueError(
                        f"Row {index} has {found} {self.image_token} placeholders and {len(row)} images: write one "
                        "placeholder per image."
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        mask = image_inputs.get("pixel_attention_mask")
        return self.image_token * (self.image_seq_length if mask is None else int(mask[image_idx].sum()))

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """Return the placeholders of images of the given sizes; vLLM plans its memory by it."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # Without a config AutoTokenizer reads the checkpoint's, and asks whether to trust its class; the files of the
        # tokenizer name what it needs.
        kwargs.setdefault("config", PreTrainedConfig())
        return super()._load_tokenizer_from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        return save_with_hooks(self, super().save_pretrained, save_directory, push_to_hub, kwargs)


__all__ = ["HfMoeProcessor"]


HfMoeProcessor.register_for_auto_class()
