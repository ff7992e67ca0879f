"""Transformers' own common model tests, from its source distribution, against our model class."""

import unittest

import torch
from helpers.transformers_suites import import_suite
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.modeling_hf_moe import hosted_class


# Tests of the mixin that do not apply to this model, and why.
NOT_APPLICABLE = {
    "test_generation_tester_mixin_inheritance": (
        "the generation mixin is not in the source distribution; tests/modeling/test_generation*.py test generation"
    ),
    "test_training_gradient_checkpointing_use_reentrant_true": (
        "reentrant checkpointing would cut the objectives' gradient and is refused; tests/modeling/test_training.py "
        "tests the refusal, and reentrant checkpointing without objectives"
    ),
}


common = import_suite("test_modeling_common")


class HfMoeModelTester:
    """The tiny model and inputs that the common tests ask for: two rows with one image each."""

    is_training = True
    batch_size = 2
    seq_length = 11
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    image_token_id = 3

    def get_config(self) -> HfMoeConfig:
        return HfMoeConfig(
            text_config=LlamaConfig(
                vocab_size=96,
                hidden_size=self.hidden_size,
                intermediate_size=48,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            vision_config=CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            ),
            moe_config={"layers": "from_1", "num_experts": 4, "objectives": {"load_balance": 0.01}},
            image_token_id=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[HfMoeConfig, dict[str, torch.Tensor]]:
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], 90) + 4
        input_ids[:, 1:5] = self.image_token_id
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, 16, 16]),
        }
        return self.get_config(), inputs


class HfMoeModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (hosted_class(HfMoeForConditionalGeneration, get_mechanism("host", "composed")),)
    _is_composite = True

    def setUp(self):
        self.model_tester = HfMoeModelTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            inputs_dict["labels"] = inputs_dict["input_ids"].clone()
        return inputs_dict


for test, reason in NOT_APPLICABLE.items():
    setattr(HfMoeModelTest, test, unittest.skip(reason)(getattr(HfMoeModelTest, test)))
