"""Models of Transformers that become a MoE in place: equal at step 0, whole, and the host left as it was."""

import gc
import weakref

import pytest
import torch
from helpers.hosts.small import fields_of, small_host
from helpers.near import assert_near

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.construction import in_place
from hf_moe.construction.in_place import from_host


HOSTS = ["llama", "llava", "qwen2_5_vl"]
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
IDS = torch.arange(5, 25)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("model_type", [*HOSTS, "mixtral"])
def test_a_loaded_host_is_left_as_it_was(model_type):
    host = small_host(model_type).train()
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    modules = {name: (type(module), module.training) for name, module in host.named_modules()}
    model = from_host(host)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    assert {name: (type(module), module.training) for name, module in host.named_modules()} == modules
    assert host.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.state_dict().items())


@pytest.mark.parametrize("model_type", [*HOSTS, "mixtral"])
def test_a_folder_gives_the_logits_of_its_model(model_type, tmp_path):
    host, checks = small_host(model_type), []
    host.save_pretrained(tmp_path)
    model = HfMoeForConditionalGeneration.from_host(tmp_path, on_check=checks.append)
    assert_near(logits(model), logits(host), 1e-5)
    assert checks[0].exact and checks[0].logit_difference < 1e-5
    assert not model.training and model.name_or_path == str(tmp_path)


def test_tied_embeddings_stay_tied():
    model = from_host(small_host("llama", tie_word_embeddings=True), moe_config=EXPERTS)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)


def test_frozen_parts_stay_frozen():
    host = small_host("llava")
    host.model.vision_tower.requires_grad_(False)
    model = from_host(host, moe_config=EXPERTS)
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    assert all(parameter.requires_grad for parameter in model.moe_layers()[0].parameters())


def test_a_system_decides_layers_routers_and_objectives():
    model = from_host(small_host("llava"), system="moiie", moe_config={"layers": [1]})
    assert list(model.moe_layers()) == [1] and model.config.system == "moiie"
    assert model.config.moe_config.router["name"] == "moiie" and "load_balance" in model.config.moe_config.objectives
    assert type(model.model.language_model.layers[0].mlp).__name__ == "LlamaMLP"


def test_experts_are_copies_and_noise_sets_them_apart():
    host = small_host("llama")
    experts = from_host(host, moe_config=EXPERTS).moe_layers()[1].experts
    assert torch.equal(experts.down_proj[2], host.model.layers[1].mlp.down_proj.weight)
    noisy, again, other = (
        from_host(host, moe_config=EXPERTS, noise=0.1, seed=seed).moe_layers()[1] for seed in (1, 1, 2)
    )
    assert not torch.equal(noisy.experts.down_proj[0], noisy.experts.down_proj[1])
    assert torch.equal(noisy.experts.down_proj, again.experts.down_proj)
    assert torch.equal(noisy.gate.weight, again.gate.weight)
    assert not torch.equal(noisy.gate.weight, other.gate.weight)


@pytest.mark.parametrize("model_type", HOSTS)
def test_a_config_gives_a_fresh_model(model_type):
    model = from_host(fields_of(model_type), system="top_k", moe_config=EXPERTS)
    assert model.config.host_type == model_type and len(model.moe_layers()) == 3
    experts = model.moe_layers()[0].experts.down_proj
    assert not torch.equal(experts[0], experts[1]) and torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("fresh", [False, True], ids=["loaded", "fresh"])
def test_routers_of_a_bfloat16_host_are_float32(fresh):
    if fresh:
        model = from_host(fields_of("llama"), system="anyexperts", dtype=torch.bfloat16)
    else:
        model = from_host(small_host("llama").bfloat16(), system="anyexperts")
    layer = model.moe_layers()[0]
    assert {parameter.dtype for parameter in layer.gate.parameters()} == {torch.float32}
    assert layer.experts.down_proj.dtype == torch.bfloat16


def test_an_adopted_host_keeps_its_routers_and_experts():
    host = small_host("mixtral")
    model = from_host(host, system="top_k")
    layer, block = model.moe_layers()[1], host.model.layers[1].mlp
    assert torch.equal(layer.experts.down_proj, block.experts.down_proj)
    assert torch.equal(layer.gate.weight, block.gate.weight)
    assert layer.spec.num_experts_per_tok == 3 and "load_balance" in model.config.moe_config.objectives
    assert [type(item).__name__ for item in model.objectives.modules() if "LoadBalance" in type(item).__name__]


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "folder"])
def test_an_adopted_host_becomes_elastic_and_stays_equal(loaded, tmp_path):
    host, checks = small_host("mixtral"), []
    host.save_pretrained(tmp_path)
    model = from_host(host if loaded else tmp_path, system="anyexperts", on_check=checks.append)
    assert checks[0].exact and checks[0].logit_difference < 1e-5
    assert_near(logits(model), logits(host), 1e-5)
    router, moe = model.config.moe_config.router, model.config.moe_config
    assert (router["name"], router["max_slots"], router["max_virtual_share"]) == ("anyexperts", 4, 0.2)
    assert moe.num_experts_per_tok == 3 and "slot_budget" in moe.objectives and model.config.system == "anyexperts"


def test_options_of_a_new_router_are_those_that_were_asked_for():
    asked, checks = {"router": {"name": "anyexperts", "max_slots": 6}, "objectives": {}}, []
    model = from_host(small_host("mixtral"), system="anyexperts", moe_config=asked, on_check=checks.append)
    assert not checks[0].exact, "it may be equal, but not by design"
    assert model.config.moe_config.router["max_slots"] == 6 and not model.config.moe_config.objectives


def test_a_router_with_rules_of_its_own_is_not_exact():
    checks = []
    model = from_host(small_host("mixtral", num_local_experts=8), system="moiie", on_check=checks.append)
    assert not checks[0].exact and checks[0].logit_difference > 1e-3 and model.config.system == "moiie"


def test_a_router_may_be_given_by_options_alone():
    model = from_host(small_host("mixtral"), moe_config={"router": {"name": "top_k", "norm_topk_prob": False}})
    assert not model.moe_layers()[0].router.norm_topk_prob


def test_a_config_of_a_moe_gives_a_fresh_one_with_the_router():
    model = from_host(fields_of("mixtral"), system="anyexperts")
    assert type(model.moe_layers()[0].router).__name__ == "AnyExpertsRouter"
    assert model.moe_layers()[0].spec.num_experts == 6 and torch.isfinite(logits(model)).all()


def test_other_experts_than_those_of_the_host_are_refused():
    with pytest.raises(ValueError, match=r"moe_config.num_experts=8 contradicts Mixtral.*num_experts=6: leave it out"):
        from_host(small_host("mixtral"), moe_config={"num_experts": 8})


def test_fewer_slots_than_those_of_the_host_are_not_exact():
    checks = []
    model = from_host(small_host("mixtral"), moe_config={"num_experts_per_tok": 1}, on_check=checks.append)
    assert not checks[0].exact and checks[0].logit_difference > 1e-3
    assert model.moe_layers()[0].spec.num_experts_per_tok == 1


def test_a_shared_branch_joins_an_adopted_host_without_effect():
    checks = []
    model = from_host(small_host("mixtral"), moe_config={"num_shared_experts": 1}, on_check=checks.append)
    assert checks[0].exact and model.moe_layers()[0].shared_expert is not None


def test_feed_forwards_of_a_folder_are_let_go_one_by_one(tmp_path, monkeypatch):
    small_host("llama").save_pretrained(tmp_path)
    feed_forwards, alive = [], []
    fill = in_place.fill_layer
    load = in_place.load_host

    def loaded(*args):
        host = load(*args)
        feed_forwards.extend(weakref.ref(layer.mlp) for layer in host.model.layers)
        return host

    def counted(*args):
        gc.collect()
        alive.append(sum(reference() is not None for reference in feed_forwards))
        return fill(*args)

    monkeypatch.setattr(in_place, "load_host", loaded)
    monkeypatch.setattr(in_place, "fill_layer", counted)
    from_host(tmp_path, moe_config=EXPERTS)
    assert alive == [3, 2, 1]


def test_experts_of_a_folder_are_not_copied(tmp_path, monkeypatch):
    small_host("mixtral").save_pretrained(tmp_path)
    loaded, load = [], in_place.load_host

    def load_and_note(*args):
        host = load(*args)
        loaded.extend(layer.mlp.experts.down_proj.data_ptr() for layer in host.model.layers)
        loaded.append(host.model.embed_tokens.weight.data_ptr())
        return host

    monkeypatch.setattr(in_place, "load_host", load_and_note)
    model = from_host(tmp_path)
    held = [layer.experts.down_proj.data_ptr() for layer in model.moe_layers().values()]
    assert [*held, model.model.embed_tokens.weight.data_ptr()] == loaded


def test_a_feed_forward_that_does_more_is_refused_by_layer():
    host = small_host("llama")

    class Shifted(type(host.model.layers[1].mlp)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 0.001

    host.model.layers[1].mlp.__class__ = Shifted
    with pytest.raises(ValueError, match=r"Shifted cannot become a MoE layer: .* of layer 1 differs from it by"):
        from_host(host, moe_config=EXPERTS)


def test_a_host_with_more_than_its_class_holds_is_refused():
    host = small_host("llava")
    host.model.vision_tower.register_parameter("added", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"vision_tower.*'added': \(2,\).*Load it anew"):
        from_host(host, moe_config=EXPERTS)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({"model_type": "t5"}, "t5 is an encoder-decoder.*Take a model of that kind"),
        ({"model_type": "qwen2_5_omni"}, r"from_host\(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained"),
        ({"model_type": "llamma"}, "model_type='llamma' is no type of model.*llama"),
        ({"model_type": "clip"}, "clip has no language head in Transformers. Take a model that writes"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_become_a_moe_names_what_can(host, message):
    with pytest.raises(ValueError, match=message):
        from_host(host)


def test_experts_of_sub_tokens_cannot_be_copies():
    with pytest.raises(ValueError, match="cannot be copies of it. Build a fresh model"):
        from_host(small_host("llama"), system="mh_moe")


def test_a_model_without_its_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no language head: load the model with the class"):
        from_host(small_host("llama").model)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    host = small_host("llama")
    host.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaModel"):
        from_host(tmp_path)
    host.config.architectures = ["LlamaForCausalLM"]
    host.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of LlamaForCausalLM, among them \['lm_head.weight'\]"):
        from_host(tmp_path)


def test_a_moe_of_this_library_is_refused(tmp_path):
    model = from_host(small_host("llama"), moe_config=EXPERTS)
    model.save_pretrained(tmp_path)
    for host in (model, tmp_path):
        with pytest.raises(ValueError, match="is a MoE of this library already.*convert_router"):
            from_host(host)


def test_a_dtype_is_of_what_is_loaded_here(tmp_path):
    host = small_host("llama")
    with pytest.raises(ValueError, match=r"convert a loaded one with host.to\(dtype\)"):
        from_host(host, dtype=torch.bfloat16)
    host.save_pretrained(tmp_path)
    model = from_host(tmp_path, dtype=torch.bfloat16, moe_config=EXPERTS)
    assert model.dtype == torch.bfloat16 and model.moe_layers()[0].gate.weight.dtype == torch.float32
