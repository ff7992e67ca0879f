"""LoRA adapters that were trained apart become the experts of one bank, unchanged."""

import pytest
import torch
from helpers.near import assert_near
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_moe import RoutingOverrides
from hf_moe.adapters.layer import tuner_layers
from hf_moe.construction.assembly import assemble_lora_experts


@pytest.fixture
def trained(llama, tmp_path):
    """Save LoRA adapters with other weights and scalings, and return their folders."""

    def build(*settings):
        folders = []
        for seed, fields in enumerate(settings):
            model = get_peft_model(
                llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **fields})
            )
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(std=0.3, generator=generator)
            folders.append(str(tmp_path / f"lora-{seed}"))
            model.save_pretrained(folders[-1])
        return folders

    return build


@pytest.mark.parametrize("unequal", [False, True])
def test_each_expert_is_the_adapter_it_came_from(llama, trained, text, tmp_path, unequal):
    settings = [{"lora_alpha": 4}, {"lora_alpha": 16}, {"use_rslora": True, "alpha_pattern": {"q_proj": 2}}]
    if unequal:
        settings[1] |= {"r": 2, "rank_pattern": {"layers.1.mlp.down_proj": 8}}
        settings[2] |= {"r": 1}
    folders = trained(*settings)
    bank = assemble_lora_experts(llama(), folders, num_experts_per_tok=1, router_input="target").eval()
    assert bank.peft_config["default"].expert_names == ["lora-0", "lora-1", "lora-2"]
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    for expert, folder in enumerate(folders):
        for layer in tuner_layers(bank):
            router = layer.moe_lora_router["default"]
            router.register_forward_pre_hook(lambda module, args, expert=expert: force(expert, module, args))
        single = PeftModel.from_pretrained(llama(), folder).eval()
        with torch.no_grad():
            found, expected = bank(**inputs).logits, single(**inputs).logits
        real = text["attention_mask"].bool()
        assert_near(found[real], expected[real], 1e-5)
    # No number more than the adapters have.
    sizes = [sum(t.numel() for t in load_file(f"{folder}/adapter_model.safetensors").values()) for folder in folders]
    bank.save_pretrained(tmp_path / "bank")
    saved = load_file(tmp_path / "bank" / "adapter_model.safetensors")
    assert sum(tensor.numel() for name, tensor in saved.items() if "_router" not in name) == sum(sizes)
    config = bank.peft_config["default"]
    assert config.r == ([4, 2, 1] if unequal else 4)
    assert config.rank_pattern == ({"model.layers.1.mlp.down_proj": [4, 8, 1]} if unequal else {})
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "bank").eval()
    torch.testing.assert_close(
        [layer.stacks("default") for layer in tuner_layers(loaded)],
        [layer.stacks("default") for layer in tuner_layers(bank)],
    )


def force(expert, router, args):
    """Leave a router one expert; with K = 1 its weight is then a probability of 1."""
    others = [other for other in range(router.spec.num_experts) if other != expert]
    args[1].overrides = RoutingOverrides(disabled_experts={router.spec.layer_idx: others})
    return args


def test_only_the_router_is_trained(llama, trained, text):
    bank = assemble_lora_experts(llama(), trained({}, {}), num_experts_per_tok=2)
    bank.train()(**text).loss.backward()
    trainable = {name for name, parameter in bank.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 and all("moe_lora_router" in name for name in trainable)
    assert all(p.grad.abs().sum() > 0 for name, p in bank.named_parameters() if name in trainable)
    bank.set_adapter("default")
    assert {name for name, parameter in bank.named_parameters() if parameter.requires_grad} == trainable
    free = assemble_lora_experts(llama(), trained({}, {}), num_experts_per_tok=2, freeze_experts=False)
    assert any("moe_lora_A" in name for name, parameter in free.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "second, message",
    [
        ({"target_modules": ["q_proj"]}, "lora-1' lacks 2 more, such as 'model.layers.0.mlp.down_proj'"),
        ({"layers_to_transform": [1]}, "lora-1' lacks 2 more, such as 'model.layers.0.mlp.down_proj'"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, "lora-1' has 2 more, such as .*v_proj"),
        ({"target_modules": ["v_proj"]}, "no targets in common"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, r"alora_invocation_tokens=\[1, 2\]"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_adapters_that_do_not_fit_together_are_refused_before_the_model_changes(llama, trained, second, message):
    folders = trained({}, second)
    host = llama()
    with pytest.raises(ValueError, match=message):
        assemble_lora_experts(host, folders)
    assert not list(tuner_layers(host)) and {name for name, _ in host.named_parameters()} == {
        name for name, _ in llama().named_parameters()
    }


def narrower(host):
    host.model.layers[1].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)


def shorter(host):
    host.model.layers = host.model.layers[:1]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            narrower,
            r"'model.layers.1.mlp.down_proj', A \(4, 48\) and B \(32, 4\), lead from 48 to 32 .* from 40 to 32",
        ),
        (shorter, "has 2 more, such as 'model.layers.1"),
    ],
)
def test_adapters_of_another_model_are_refused_before_it_changes(llama, trained, change, message):
    folders = trained({}, {})
    host = llama()
    change(host)
    with pytest.raises(ValueError, match=message):
        assemble_lora_experts(host, folders)
    assert not list(tuner_layers(host))


def test_an_adapter_that_was_converted_to_plain_lora_is_an_expert(llama, text, tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    model(**text).loss.backward()
    torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05).step()
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    bank = assemble_lora_experts(llama(), [str(tmp_path / "plain")], router="constant", num_experts_per_tok=1).eval()
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found, expected = bank(**inputs).logits, model.eval()(**inputs).logits
    real = text["attention_mask"].bool()
    assert_near(found[real], expected[real], 1e-4)


@pytest.mark.parametrize("own", ["org/C", ""])
def test_adapters_of_other_bases_are_warned_of(llama, trained, own, recwarn):
    folders = trained({}, {})
    host = llama()
    assemble_lora_experts(host, folders)
    assert not any("other bases" in str(warning.message) for warning in recwarn)
    for folder, base in zip(folders, ("org/A", "org/B"), strict=True):
        config = LoraConfig.from_pretrained(folder)
        config.base_model_name_or_path = base
        config.save_pretrained(folder)
    host = llama()
    host.name_or_path = own
    with pytest.warns(UserWarning, match=f"than the model '{own}': .*lora-0': 'org/A', .*lora-1': 'org/B'"):
        assemble_lora_experts(host, folders)


@pytest.mark.parametrize(
    "adapters, options, message",
    [
        ([], {}, "a list of one or more folders"),
        ("lora-0", {}, "a list of one or more folders"),
        (["lora-0"], {"num_experts": 2}, "num_experts follows from the adapters of a bank: leave num_experts=2 out"),
        (["lora-0"], {"target_modules": ["q_proj"]}, "target_modules follows from the adapters"),
        (["lora-0"], {"r": 2}, "r follows from the adapters"),
        (["lora-0"], {"target_overrides": {"q_proj": {"r": 2}}}, "'q_proj'.*r follow from the adapters"),
        (["lora-0"], {"routr": "top_k"}, "Unknown option of assemble_lora_experts 'routr'. Did you mean 'router'"),
    ],
)
def test_what_follows_from_the_adapters_is_no_option(llama, adapters, options, message):
    with pytest.raises(ValueError, match=message):
        assemble_lora_experts(llama(), adapters, **options)


def test_something_else_than_lora_is_no_expert(llama, trained, tmp_path):
    get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(ValueError, match="is a IA3Config"):
        assemble_lora_experts(llama(), [*trained({}), str(tmp_path / "ia3")])
