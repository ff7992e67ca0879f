"""Adoption of MoE decoders: routers and experts are taken over, logits stay."""

import pytest
import torch
from helpers.hosts.composed import composed_moe, logit_gap
from helpers.trainer_loads import assert_trainer_reads_back
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_moe import HfMoeForConditionalGeneration


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HOSTS = {
    "mixtral": ("mixtral", {"num_local_experts": 4}, [0, 1, 2, 3]),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}, [0, 1, 2, 3]),
    "qwen3_moe_normalised": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
        [0, 1, 2, 3],
    ),
    "qwen3_moe_partly_dense": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        [1],
    ),
    "olmoe": ("olmoe", {"num_experts": 4}, [0, 1, 2, 3]),
    "olmoe_normalised": ("olmoe", {"num_experts": 4, "norm_topk_prob": True}, [0, 1, 2, 3]),
}

DEEPSEEK = {"n_routed_experts": 8, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
# More than a softmax gate and experts.
FURTHER = {
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
        [0, 1, 2, 3],
    ),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, **LATENT, "first_k_dense_replace": 1}, [1, 2, 3]),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 4, "head_dim": 8}, [0, 1, 2, 3]),
}


def moe_decoder(model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "num_experts_per_tok": 2, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def adopted(host):
    """Return a model with the weights of a MoE decoder."""
    return composed_moe(moe_decoder(HOSTS[host][0], **HOSTS[host][1]))


@pytest.mark.parametrize("host", [*HOSTS, *FURTHER])
def test_adopted_decoder_keeps_its_logits(host):
    model_type, fields, layers = {**HOSTS, **FURTHER}[host]
    dense = moe_decoder(model_type, **fields)
    model = composed_moe(dense)
    assert list(model.moe_layers()) == layers
    assert logit_gap(model, dense) < 1e-5


@pytest.mark.parametrize("host", HOSTS)
def test_trainer_reads_back_every_tensor_of_a_host(tmp_path, host):
    model = adopted(host)
    assert_trainer_reads_back(model, tmp_path)


def test_trainer_reads_back_every_shard(tmp_path):
    model = adopted("mixtral")
    assert_trainer_reads_back(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("host", HOSTS)
def test_checkpoints_under_the_hosts_own_names_still_load(tmp_path, host):
    """Versions before this one saved so."""
    model = adopted(host)
    model.save_pretrained(tmp_path / "old", save_original_format=True)
    assert load_file(tmp_path / "old" / "model.safetensors").keys() != model.state_dict().keys()
    opened, report = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(report.values())
    opened.save_pretrained(tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("host", HOSTS)
def test_a_state_under_the_hosts_own_names_loads(tmp_path, host):
    """So `Trainer` reads the checkpoints of older versions."""
    model = adopted(host)
    model.save_pretrained(tmp_path, save_original_format=True)
    opened = adopted(host)
    with torch.no_grad():
        for parameter in opened.parameters():
            parameter.zero_()
    result = opened.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


class Scores(TrainerCallback):
    """Makes the evaluation at step 2 the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = 0.0 if state.global_step == 2 else 1.0


def train(folder, **options):
    model = adopted("mixtral")
    ids = torch.arange(8 * 6).reshape(8, 6)
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], logging_steps=1, seed=0, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:1], callbacks=[Scores()])


def test_an_adopted_run_resumes_as_if_it_had_not_stopped(tmp_path):
    whole, resumed = train(tmp_path), train(tmp_path)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    first, second = (
        {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
        for run in (whole, resumed)
    )
    assert first == second and set(first) == {1, 2, 3, 4}
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
def test_a_run_resumes_from_a_checkpoint_of_an_older_version(tmp_path, max_shard_size):
    whole, resumed = train(tmp_path), train(tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    model = adopted("mixtral")
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, save_original_format=True, max_shard_size=max_shard_size)
    files = sorted(checkpoint.glob("model*.safetensors"))
    assert any(".experts.0.w1." in name for file in files for name in load_file(file))
    if max_shard_size == "60KB":
        assert len(files) > 1
        with pytest.raises(ValueError, match=r"from_pretrained\(folder\).save_pretrained\(folder\)"):
            train(tmp_path).train(resume_from_checkpoint=str(checkpoint))
        model.from_pretrained(checkpoint).save_pretrained(checkpoint)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_the_best_model_of_an_adopted_run_is_that_of_its_step(tmp_path):
    run = train(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in run.model.state_dict().items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize("norm", [True, False])
def test_normalisation_is_told_apart(norm):
    model = composed_moe(moe_decoder("olmoe", num_experts=4, norm_topk_prob=norm))
    assert model.config.moe_config.router["norm_topk_prob"] is norm


def test_a_block_with_more_than_a_place_here_is_refused_with_its_layer():
    dense = moe_decoder("mixtral", num_local_experts=4)
    dense.model.layers[2].mlp.temperature = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"Layer 2 of MixtralModel: .* cannot be adopted: it holds \['temperature'\]"):
        composed_moe(dense)


def test_layers_that_differ_become_maps():
    dense = moe_decoder("olmoe", num_experts=4)
    dense.model.layers[1].mlp.gate.norm_topk_prob = True
    model = composed_moe(dense)
    router = {layer: options["norm_topk_prob"] for layer, options in model.config.moe_config.router.items()}
    assert router == {"0": False, "1": True, "2": False, "3": False}
    assert logit_gap(model, dense) < 1e-5


def test_one_renormalised_slot_is_refused():
    with pytest.raises(ValueError, match="one slot per token"):
        composed_moe(moe_decoder("mixtral", num_local_experts=4, num_experts_per_tok=1))
