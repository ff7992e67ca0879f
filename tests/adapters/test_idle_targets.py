"""Targets whose weight a host reads without calling them, linear layers of another class, and routers' names."""

import warnings

import pytest
import torch
import transformers as tf
from helpers.adapted import logits
from helpers.hosts.families import HOSTS, SIZES, TEXT, VISION, words
from helpers.near import assert_near
from peft import get_peft_model
from torch import nn

from hf_moe import MoeLoraConfig, Router, register_router
from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling import registry


JAMBA = {**TEXT, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 9}


def adapt(model, *targets, **fields):
    return get_peft_model(model, MoeLoraConfig(target_modules=list(targets), **fields))


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_what_lora_refuses_on_mamba_is_refused(name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 64}
    classes = {"mamba": (tf.MambaForCausalLM, tf.MambaConfig)}
    classes["falcon_mamba"] = (tf.FalconMambaForCausalLM, tf.FalconMambaConfig)
    model, config = classes[name]
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        adapt(model(config(**sizes)), "in_proj", "out_proj")


def test_the_projection_of_torchs_own_attention_is_refused():
    config = tf.SiglipVisionConfig(**VISION)
    with pytest.raises(ValueError, match="never calls it: experts would not act"):
        adapt(tf.SiglipVisionModel(config), "q_proj", "out_proj")


SSM = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 64, "time_step_rank": 4}
SPEECH = {"conv_dim": (32,), "conv_kernel": (10,), "conv_stride": (5,), "num_conv_pos_embeddings": 8}
SPEECH |= {**SIZES, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 1, "vocab_size": 64}


def wavlm():
    return tf.WavLMModel(tf.WavLMConfig(**SPEECH, mask_time_prob=0.0))


READ = {
    "wavlm": (wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"], ["intermediate_dense"]),
    "jamba": (lambda: tf.JambaForCausalLM(tf.JambaConfig(**JAMBA)), ["dt_proj"], ["x_proj", "q_proj"]),
    "mamba": (lambda: tf.MambaForCausalLM(tf.MambaConfig(**SSM)), ["dt_proj"], ["x_proj"]),
    "falcon_mamba": (lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**SSM)), ["dt_proj"], ["x_proj"]),
}


@pytest.mark.parametrize("name", READ)
def test_targets_that_a_host_reads_without_a_call_are_named(name):
    build, read, called = READ[name]
    torch.manual_seed(0)
    model = adapt(build(), *read, *called).train()
    inputs = {"input_values": torch.randn(2, 200)} if name == "wavlm" else {"input_ids": words()["input_ids"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        next(iter(model(**inputs).values())).sum().backward()
    (found,) = (str(item.message) for item in caught if "did nothing" in str(item.message))
    idle = {layer.key["default"].rpartition(".")[2] for layer in tuner_layers(model) if not layer.has_acted}
    assert idle == set(read)
    assert all(f".{target}" in found for target in read) and not any(f".{target}" in found for target in called)
    for layer in tuner_layers(model):  # the warning says what training would do
        gradient = layer.moe_lora_B["default"].grad
        assert (gradient is not None and bool(gradient.any())) == layer.has_acted


class Reading(nn.Module):
    """A model with one layer that is called and one whose weight is read."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(x) @ self.read.weight


@pytest.mark.parametrize("targets", [["called", "read"], ["called"]])
def test_targets_that_a_training_step_does_not_call_are_warned_of(targets):
    model = adapt(Reading(), *targets, router_input="target").train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
    found = [str(item.message) for item in caught if "did nothing" in str(item.message)]
    assert len(found) == ("read" in targets) and all("experts on read did" in text for text in found)


@pytest.mark.parametrize("system", ["mixlora", "octavius"])
def test_targets_that_act_are_not_warned_of(system):
    for host in ("llama", "mixtral") if system == "octavius" else ("llama",):
        model = get_peft_model(HOSTS[host].build(), MoeLoraConfig.from_system(system)).train()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*did nothing")
            model(**words()).loss.backward()


class Counting(nn.Linear):
    """As Falcon's: a subclass that computes what a linear layer does."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Doubling(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_layers(cls):
    torch.manual_seed(0)
    model = HOSTS["llama"].build().eval()
    for layer in model.model.layers:
        old, layer.self_attn.q_proj = layer.self_attn.q_proj, cls(32, 32)
        layer.self_attn.q_proj.weight = old.weight
    return model


def test_a_linear_layer_of_another_class_merges_if_it_is_one(randomise):
    fields = {"router": "constant", "num_experts": 2}
    model = adapt(with_layers(Counting), "q_proj", **fields)
    randomise(model)
    expected = logits(model, words())
    assert_near(logits(model.merge_and_unload(), words()), expected, 1e-5)
    with pytest.raises(ValueError, match="and a target is a Doubling"):
        adapt(with_layers(Doubling), "q_proj", **fields).merge_and_unload()


class Packed(nn.Module):
    """As a quantiser's: its own class, with packed weights and widths."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.detach().half())

    def forward(self, x):
        return x @ self.qweight.float().T


def test_a_quantisers_linear_layer_has_its_own_widths(randomise):
    torch.manual_seed(0)
    host = HOSTS["llama"].build().eval()
    for layer in host.model.layers:
        layer.mlp.up_proj, layer.mlp.down_proj = Packed(layer.mlp.up_proj), Packed(layer.mlp.down_proj)
    base = logits(host, words())
    model = adapt(host, "up_proj", "down_proj")
    assert {(layer.in_features, layer.out_features) for layer in tuner_layers(model)} == {(32, 48), (48, 32)}
    assert_near(logits(model, words()), base)
    randomise(model)
    model(**words()).loss.backward()
    assert all(layer.moe_lora_B["default"].grad.any() for layer in tuner_layers(model))


def test_a_registered_router_is_found_and_takes_no_name(monkeypatch):
    class Mine(Router):
        def forward(self, hidden_states, context):
            raise NotImplementedError

    monkeypatch.setitem(registry._REGISTERED, "router", {})
    for name in ("mine", "sequence"):
        own = register_router(name)(type("Mine", (Mine,), {"__module__": "elsewhere"}))
        config = MoeLoraConfig(target_modules=["q_proj"], router=name)
        settings = config.settings("")
        assert type(config.build_router(config.spec(0, 8, settings), settings)) is own
    register_router("host")(type("Mine", (Mine,), {"__module__": "elsewhere"}))
    with pytest.raises(ValueError, match="router 'host' is registered by elsewhere.*another name"):
        MoeLoraConfig(target_modules=["q_proj"], router="host")
