"""A tiny vision-language model and its processor, shared by the tests of data and evaluation."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, HfMoeProcessor
from hf_moe.modeling import registry


WORDS = (
    "<pad> <unk> <s> </s> <image> user assistant system what is this and that ? yes no red blue dark circle".split()
)
CHAT_TEMPLATE = (
    "<s> {% for message in messages %}{{ message.role }} "
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}"
    "{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def forget_later():
    """Forget the mechanisms that are registered from outside the package from now on; its own stay once imported."""
    before = {kind: set(registry.registered(kind)) for kind in registry.KINDS}
    yield
    for kind, known in before.items():
        for name, cls in registry.registered(kind).items():
            if name not in known and not cls.__module__.startswith("hf_moe."):
                del registry._REGISTERED[kind][name]


# What a test registers is forgotten after it, what a fixture of a module does after the module.
forget_after_test = pytest.fixture(autouse=True)(forget_later)
forget_after_module = pytest.fixture(autouse=True, scope="module")(forget_later)


@pytest.fixture
def processor():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessor(size=size, crop_size=size)
    return HfMoeProcessor(image_processor, tokenizer, image_seq_length=4, chat_template=CHAT_TEMPLATE)


@pytest.fixture
def vlm(processor):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = HfMoeConfig(
        text_config=LlamaConfig(**sizes, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=2, eos_token_id=3),
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        connector={"name": "mlp"},
        image_token_id=processor.image_token_id,
        moe_config={"num_experts": 4, "num_experts_per_tok": 2, "router": "top_k"},
    )
    model = HfMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.model.vision_tower.requires_grad_(False)
    return model


@pytest.fixture
def picture():
    def draw(seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8))

    return draw


def turn(role: str, *parts: str) -> dict:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


@pytest.fixture
def rows(picture):
    """Four rows with one, no, two and one images; the last shows the first one's picture again."""
    return [
        {
            "messages": [turn("user", "<image>", "what is this ?"), turn("assistant", "circle")],
            "images": [picture(0)],
            "image_id": "first",
        },
        {"messages": [turn("user", "is this red ?"), turn("assistant", "no")], "images": [], "image_id": None},
        {
            "messages": [
                turn("user", "<image>", "this and", "<image>", "that ?"),
                turn("assistant", "red and blue"),
                turn("user", "what is dark ?"),
                turn("assistant", "blue"),
            ],
            "images": [picture(1), picture(2)],
            "image_id": ["second", "third"],
        },
        {
            "messages": [turn("user", "<image>", "is this red ?"), turn("assistant", "yes")],
            "images": [picture(0)],
            "image_id": "first",
        },
    ]


@pytest.fixture
def questions(rows):
    """A dataset of single-image questions, some with a column of answers."""
    picked = [rows[0], rows[3]]
    return Dataset.from_list(
        [
            {**row, "answer": row["messages"][-1]["content"][0]["text"], "question_type": kind}
            for row, kind in zip(picked, ("shape", "yes/no"), strict=True)
        ]
    )
