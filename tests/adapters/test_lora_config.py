"""The configuration refuses what cannot work, and the method is registered with PEFT the way PEFT wants it."""

import enum

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from hf_moe import MoeLoraConfig, __version__
from hf_moe.adapters.config import add_peft_type
from hf_moe.adapters.model import MoeLoraModel


def test_the_method_is_a_member_of_pefts_enum_and_registered():
    member = PeftType("MOE_LORA")
    assert member is PeftType.MOE_LORA is PeftType["MOE_LORA"] and member in list(PeftType)
    assert member == "MOE_LORA" and member.value.lower() == "moe_lora"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is MoeLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is MoeLoraModel
    assert add_peft_type("MOE_LORA") is member


def test_an_enum_that_takes_no_members_is_a_clear_error(monkeypatch):
    class Closed(type(PeftType)):
        def __setattr__(cls, name, value):
            if name == "MOE_LORA":
                raise AttributeError(name)
            super().__setattr__(name, value)

    class ClosedType(enum.StrEnum, metaclass=Closed):
        LORA = "LORA"

    monkeypatch.setattr("hf_moe.adapters.config.PeftType", ClosedType)
    with pytest.raises(RuntimeError, match="takes no new member 'MOE_LORA'"):
        add_peft_type("MOE_LORA")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 0}, "r=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 must be at least 1"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\]=-1 must be greater than 0"),
        ({"shared_r": -1}, "shared_r=-1"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"router": "top_q"}, "top_k"),
        ({"router": {"name": "top_k", "norm_top_prob": False}}, "norm_topk_prob"),
        ({"router": {"norm_topk_prob": False}}, "needs the key 'name'"),
        ({"router": "llama4"}, "num_experts_per_tok"),
        ({"router_input": "layer"}, "'decoder_layer', 'model', 'target'"),
        ({"objectives": {"load_balanced": 0.1}}, "load_balance"),
        ({"objectives": {"router_z": -1.0}}, "must be at least 0"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"r": "8"}, r"r='8' must be int \| list\[int\]"),
        ({"r": 8.0}, "r=8.0 must be int"),
        ({"r": (4, 4, 4, 4)}, r"r=\(4, 4, 4, 4\) must be int \| list"),
        ({"r": [4, 0, 4, 4]}, "must be at least 1"),
        ({"r": [4, 4]}, "each of num_experts=4"),
        ({"num_experts": True}, "num_experts=True must be int"),
        ({"num_experts_per_tok": "2"}, r"must be int \| None"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be greater than 0"),
        ({"lora_alpha": None}, "lora_alpha=None must be float"),
        ({"lora_dropout": None}, "lora_dropout=None must be float"),
        ({"shared_r": 2.5}, "shared_r=2.5 must be int"),
        ({"router": None}, r"router=None must be str \| dict"),
        ({"router": {"name": "top_k", "norm_topk_prob": "yes"}}, "norm_topk_prob='yes' must be bool"),
        ({"router": {"name": "sequence", "modalities": "text"}}, r"modalities='text' must be list\[str\]"),
        ({"router": {"name": "becotta", "num_domains": 0}}, "num_domains=0"),
        ({"experts": {"name": "bottleneck", "rank": 3}}, "Unknown option of the experts 'bottleneck' 'rank'"),
        ({"experts": {"name": "bottleneck", "activation": "gleu"}}, "activation='gleu': allowed are"),
        ({"experts": {"name": "ia3", "feedforward_modules": "down_proj"}}, "feedforward_modules='down_proj' must be"),
        ({"experts": {"name": "value_gate", "head_dim": 0}}, "head_dim=0"),
        ({"experts": "rank1_pairs", "num_experts": 5, "r": 1}, "must be a square"),
        ({"objectives": ["load_balance"]}, r"objectives=\['load_balance'\] must be dict"),
        ({"objectives": {"load_balance": "a"}}, "must be dict"),
        ({"expert_names": ["a", "b", "c", "d", "d"]}, "a name of its own"),
        ({"frozen_experts": 2}, r"frozen_experts=2 must be list\[int\]"),
        ({"frozen_experts": [4]}, r"must lie in \[0, 4\)"),
        ({"target_overrides": {"q_proj": 3}}, "target_overrides=.* must be dict"),
        ({"target_overrides": {"q_proj": {"r": "4"}}}, r"target_overrides\['q_proj'\]\['r'\]='4' must be int"),
        ({"target_overrides": {"q_proj": {"rank": 4}}}, "Unknown field of target_overrides 'rank'"),
        ({"model_part": "decoder"}, "'language_model', 'towers'"),
    ],
)
def test_a_field_that_cannot_work_is_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        MoeLoraConfig(target_modules=["q_proj"], **fields)


def test_a_configuration_comes_back_from_disk_as_it_was(tmp_path):
    config = MoeLoraConfig(
        r=4,
        num_experts=8,
        target_modules=["q_proj", "down_proj"],
        router={"name": "top_k", "score_function": "sigmoid"},
        router_input="target",
        objectives={"load_balance": {"coef": 0.01, "scope": "sequence"}},
        rank_pattern={"down_proj": 2},
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "hf_moe_version": __version__}
