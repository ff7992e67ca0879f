"""Transformers' own common processor tests, from its source distribution, against our processor class."""

import unittest

from helpers.transformers_suites import import_suite
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from hf_moe import HfMoeProcessor


common = import_suite("test_processing_common")

# Tests of the mixin that do not apply to this processor, and why.
VIDEOS = "the test gives videos and audio to every processor, and ours refuses what it cannot use"
NOT_APPLICABLE = {
    "test_model_input_names": VIDEOS,
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": VIDEOS,
    "test_if_input_has_mismatching_tokens_and_mm_data": (
        "the test asks for the words of Transformers' error; ours names the row, as tests/hub/test_processor.py tests"
    ),
}


class HfMoeProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = HfMoeProcessor

    @classmethod
    def _setup_tokenizer(cls):
        # One token a byte: whatever text the tests write is known.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<image>", *alphabet])}
        tokenizer = Tokenizer(models.BPE(tokens, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<image>"],
        )

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_length": 4}


for test, reason in NOT_APPLICABLE.items():
    setattr(HfMoeProcessorTest, test, unittest.skip(reason)(getattr(HfMoeProcessorTest, test)))
