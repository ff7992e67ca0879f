"""The processor: images and text in, placeholders expanded, modality ids beside the tokens."""

import inspect
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.processing_utils import MultiModalData, ProcessorMixin

from ..configuration.reading import PROCESSOR_FILES, check_files, check_names, processor_problem
from ..configuration.saving import save_with_package
from .image_loading import IMAGE_SOURCES, is_list, open_image, open_image_lists


class HfMoeProcessor(ProcessorMixin):
    r"""
    Pairs any image processor with any tokenizer.

    Every `image_token` in the text stands for one image and is expanded to `image_seq_length` placeholders, or to the
    patches the image really has where the tower takes packed patches. The output holds `input_ids`, `attention_mask`,
    `mm_token_type_ids` and the image processor's tensors. Images come in any form that [`open_image`] knows.

    Args:
        image_processor: the tower's image processor.
        tokenizer: the decoder's tokenizer; it must know `image_token`. Set to pad on the left, as generation needs.
        image_seq_length (`int`, *optional*): placeholders per image: the model config's `image_seq_length`.
        image_token (`str`, defaults to `"<image>"`): the placeholder.
        chat_template (`str`, *optional*): a Jinja template that writes `image_token` where an image stands.

    Raises:
        ValueError: if one of the two is missing, the tokenizer does not know `image_token`, or `image_seq_length` is
            not a positive number.
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
        _check_parts(image_processor, tokenizer)
        is_count = isinstance(image_seq_length, int) and not isinstance(image_seq_length, bool)
        if image_seq_length is not None and not (is_count and image_seq_length > 0):
            raise ValueError(f"image_seq_length is the number of placeholders per image, got {image_seq_length!r}.")
        if not isinstance(image_token, str) or not image_token:
            raise ValueError(f"image_token is the text of a token, such as '<image>', got {image_token!r}.")
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

    @staticmethod
    def open_image(image: Any) -> Any:
        """Return a picture as the RGB image (of Pillow) that this processor makes of it, see [`open_image`]."""
        return open_image(image)

    def __call__(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        samples = text if isinstance(text, list | tuple) else [text]
        begin = self.tokenizer.bos_token
        if begin and samples and all(isinstance(sample, str) and sample.startswith(begin) for sample in samples):
            kwargs.setdefault("add_special_tokens", False)  # rendered by a template, which has written them
        return super().__call__(images, text, *args, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render conversations, and with `tokenize=True` process their images, as every processor does.

        The image of a content part stands under one of `image`, `url`, `path`, `base64`; empty fields, which Arrow
        adds to the parts of a column, are none.
        """
        # As with a tokenizer, the template writes the special tokens: an end that the tokenizer adds would close the
        # prompt before it is answered.
        options = {"add_special_tokens": False, **(kwargs.pop("processor_kwargs", None) or {})}
        conversation = _without_empty_fields(conversation)
        return super().apply_chat_template(conversation, *args, processor_kwargs=options, **kwargs)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Open the images and check the types of what was given."""
        if text is not None:
            text = _checked_text(text)
        if images is not None:
            _refuse_unscaled_floats(images, {**kwargs, **(kwargs.get("images_kwargs") or {})})
            images = open_image_lists(images)
            images = images if any(images) else None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Check that every row has as many images as placeholders, and some tokens."""
        given = [name for name in ("videos", "audio") if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"{type(self).__name__} takes images and text, got {' and '.join(given)}.")
        if images is not None and self.image_seq_length is None and not self._packs_patches():
            raise ValueError("The processor has no image_seq_length: set it to the model config's.")
        if text is not None:
            self._check_counts(images or [], [text] if isinstance(text, str) else text)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _check_counts(self, images: list, text: list[str]) -> None:
        remedy = f"write one {self.image_token} per image."
        found = [sample.count(self.image_token) for sample in text]
        nested = any(isinstance(row, list) for row in images)
        if nested and len(images) != len(text):
            raise ValueError(f"There are {len(text)} texts and images for {len(images)} rows: give one list per text.")
        if not nested and images and len(text) > 1:
            if sum(found) != len(images):
                raise ValueError(
                    f"The {len(text)} texts have {sum(found)} {self.image_token} placeholders ({found} by row), but "
                    f"{len(images)} images were given: {remedy}"
                )
            return
        counts = [len(row) for row in images] if nested else [len(images)] * len(text)
        for index, (sample, placeholders, count) in enumerate(zip(text, found, counts, strict=True)):
            if placeholders != count:
                raise ValueError(
                    f"Row {index} has {placeholders} {self.image_token} placeholders and {count} images: {remedy}"
                )
            if not sample and not self.tokenizer(sample)["input_ids"]:
                raise ValueError(f"Row {index} is an empty text, of which the tokenizer makes no token.")

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        # Transformers names the counts of all rows; which row was cut is what one needs.
        for index, (sample, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=False)):
            wanted, left = sample.count(self.image_token), list(ids).count(self.image_token_id)
            if left < wanted:
                raise ValueError(
                    f"Row {index} has {wanted} image tokens, of which truncation to {len(ids)} tokens left {left}: "
                    "raise max_length, or shorten the text."
                )
        super()._check_special_mm_tokens(text, text_inputs, modalities)

    def _packs_patches(self) -> bool:
        return "pixel_attention_mask" in self.image_processor.model_input_names

    @property
    def model_input_names(self) -> list[str]:
        """The names of the model's inputs, the token ids first: by them `Trainer` groups rows by length."""
        names = ["input_ids", *super().model_input_names, "mm_token_type_ids"]
        return list(dict.fromkeys(names))

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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        source = pretrained_model_name_or_path
        check_files(source, (*PROCESSOR_FILES, "config.json"))
        check_names(Path(source) / "processor_config.json", list(inspect.signature(cls).parameters))
        try:
            return super().from_pretrained(source, **kwargs)
        # The library of the tokenizers raises plain `Exception`.
        except Exception as error:
            reason = processor_problem(Path(source))
            if reason is None and isinstance(error, ValueError | OSError | ImportError):
                raise
            raise ValueError(f"The processor of {source} cannot be read: {reason or error}") from error

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # Without a config AutoTokenizer reads the checkpoint's, and asks whether to trust its class; the files of the
        # tokenizer name what it needs.
        kwargs.setdefault("config", PreTrainedConfig())
        return super()._load_tokenizer_from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        return save_with_package(self, super().save_pretrained, save_directory, push_to_hub, kwargs)


def _check_parts(image_processor: Any, tokenizer: Any) -> None:
    wanted = {
        "a tokenizer": (tokenizer, "convert_tokens_to_ids"),
        "an image processor": (image_processor, "preprocess"),
    }
    for name, (part, method) in wanted.items():
        if not hasattr(part, method):
            raise ValueError(
                f"HfMoeProcessor(image_processor, tokenizer) needs {name}, got {type(part).__name__}. A model of "
                "text alone needs only its tokenizer."
            )


def _checked_text(text: Any) -> str | list[str]:
    if isinstance(text, str):
        return text
    if not is_list(text):
        raise ValueError(f"The text is a string or a list of strings, got {type(text).__name__}.")
    text = list(text)
    if not text:
        raise ValueError("The text is an empty list: give one string per row.")
    for index, sample in enumerate(text):
        if not isinstance(sample, str):
            raise ValueError(f"Row {index} of the text is of type {type(sample).__name__}, but a text is a string.")
    return text


def _refuse_unscaled_floats(images: Any, options: dict[str, Any]) -> None:
    """Refuse floats that are to be left unscaled: all pictures become 8-bit images first."""
    if options.get("do_rescale") is not False:
        return
    if is_list(images):
        for image in images:
            _refuse_unscaled_floats(image, options)
    elif getattr(getattr(images, "dtype", None), "kind", "") == "f" or getattr(images, "is_floating_point", bool)():
        raise ValueError(
            "do_rescale=False does not fit pictures of floats, which are brought to 8 bits like all others: leave it "
            "out, or pass pixel_values to the model."
        )


def _without_empty_fields(conversation: Any) -> Any:
    if isinstance(conversation, list | tuple):
        return [_without_empty_fields(item) for item in conversation]
    if not isinstance(conversation, dict) or not isinstance(conversation.get("content"), list | tuple):
        return conversation
    parts = []
    for part in conversation["content"]:
        if isinstance(part, dict):
            part = {name: value for name, value in part.items() if value is not None}
            sources = [name for name in IMAGE_SOURCES if name in part]
            if part.get("type") == "image" and len(sources) > 1:
                raise ValueError(f"A content part has images under {' and '.join(sources)}: keep one of them.")
        parts.append(part)
    return {**conversation, "content": parts}


__all__ = ["HfMoeProcessor"]
