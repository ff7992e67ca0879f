"""Expert evolution: the rules, one evolution per optimizer step, resuming, and the MoE that comes of it."""

import shutil

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.near import assert_near
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, Trainer, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.evolution import EVOLUTION_FILE, ExpertEvolution, assemble
from hf_moe.modeling.parts import text_decoder


LAYERS = [1, 3]


def config_of(layers, **moe_config) -> HfMoeConfig:
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, vocab_size=40)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return HfMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=39,
        initializer_range=0.2,
        moe_config={"layers": layers, **moe_config},
    )


def moe_config_of(**fields) -> HfMoeConfig:
    return config_of(LAYERS, **{"num_experts": 4, "num_experts_per_tok": 1, "router": "evomoe_dtr", **fields})


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return HfMoeForConditionalGeneration(config_of([]))


def rows(count: int = 16) -> list[dict]:
    ids = torch.randint(3, 30, (count, 10), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, folder, evolution, steps=4, resume=None, **options) -> Trainer:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2, **options}
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=1e-2, use_cpu=True, report_to="none", **options
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows(), callbacks=[evolution])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Recorder(ExpertEvolution):
    """Keeps expert 1 at the start and after every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.path = []

    def start(self, model):
        super().start(model)
        self.path.append(self.snapshot(model))

    def evolve(self, before, after, gradient=None):
        assert all(torch.equal(before[name], self.path[-1][name]) for name in before)
        self.path.append(after)
        super().evolve(before, after, gradient)


@pytest.mark.parametrize("rule", ["delta", "ema"])
def test_experts_move_by_evolution_alone_once_per_optimizer_step(dense, tmp_path, rule):
    evolution = Recorder(LAYERS, rule=rule, beta_ranges=[0.9, 0.5])
    train(dense, tmp_path, evolution, weight_decay=0.1)
    assert len(evolution.path) == 1 + 4, "two micro-batches make one step"
    for expert, beta in zip(evolution.experts, (0.9, 0.5), strict=True):
        for name, theta in expert.items():
            expected = evolution.path[0][name]
            for before, after in zip(evolution.path, evolution.path[1:], strict=False):
                first, last = after[name].double(), before[name].double()
                if rule == "delta":
                    expected = (expected + (1 - beta) * (first - last)).float()
                else:
                    expected = (beta * expected.double() + (1 - beta) * first).float()
            assert torch.equal(theta, expected), name
            assert not torch.equal(theta, evolution.path[0][name])


@pytest.mark.parametrize("rule", ["delta", "ema"])
@pytest.mark.parametrize("granularity", ["step", "tensor", "row"])
def test_beta_0_gives_expert_1_and_beta_1_the_start_to_the_bit(dense, tmp_path, rule, granularity):
    evolution = Recorder(LAYERS, rule=rule, beta_ranges=[0, 1.0], beta_granularity=granularity)
    train(dense, tmp_path, evolution)
    start, end = evolution.path[0], evolution.path[-1]
    assert all(torch.equal(theta, end[name]) for name, theta in evolution.experts[0].items())
    assert all(torch.equal(theta, start[name]) for name, theta in evolution.experts[1].items())
    assert not any(torch.equal(start[name], end[name]) for name in start)


def test_the_literal_rule_is_the_printed_equation():
    evolution = ExpertEvolution([0], rule="literal", beta_ranges=[0.75])
    evolution.experts = [{"0.w": torch.zeros(2)}]
    after, gradient = {"0.w": torch.tensor([1.0, 2.0])}, {"0.w": torch.tensor([4.0, 8.0])}
    evolution.evolve({}, after, gradient)
    assert evolution.experts[0]["0.w"].tolist() == [0.75 * 1 + 0.25 * 4, 0.75 * 2 + 0.25 * 8]


def test_the_literal_rule_reads_the_gradients_of_the_trainer(dense, tmp_path):
    evolution = Recorder([1], rule="literal", beta_ranges=[0.0])
    train(dense, tmp_path, evolution, steps=1)
    for name, theta in evolution.experts[0].items():
        assert theta.abs().max() > 0 and not torch.equal(theta, evolution.path[-1][name]), name


def test_a_resumed_run_has_the_experts_of_one_that_was_not_stopped(dense, tmp_path):
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    whole = ExpertEvolution(LAYERS)
    train(dense, tmp_path / "whole", whole)
    assert (tmp_path / "whole" / "checkpoint-2" / EVOLUTION_FILE).is_file()
    dense.load_state_dict(state)
    resumed = ExpertEvolution(LAYERS)
    train(dense, tmp_path / "whole", resumed, resume=str(tmp_path / "whole" / "checkpoint-2"))
    for expert, expected in zip(resumed.experts, whole.experts, strict=True):
        assert all(torch.equal(expert[name], expected[name]) for name in expected)


@pytest.fixture
def stopped(dense, tmp_path):
    """Two runs of equal length that differ in their betas, and the dense model's first weights."""
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for name, seed in (("one", 0), ("other", 5)):
        dense.load_state_dict(state)
        # Another seed of the data, so that expert 1 differs too.
        train(dense, tmp_path / name, ExpertEvolution(LAYERS, seed=seed), data_seed=seed)
    dense.load_state_dict(state)
    return tmp_path


@pytest.mark.parametrize("way", ["given", "moved", "moved into a folder with another's"])
def test_experts_come_from_the_checkpoint_that_is_resumed(dense, stopped, way):
    given, output = stopped / "one" / "checkpoint-2", stopped / "fresh"
    options = {}
    if way != "given":
        given = (stopped / "one").rename(stopped / "elsewhere") / "checkpoint-2"
        options = {"resume_from": given}
    if way == "moved into a folder with another's":
        output = stopped / "other"
    resumed = ExpertEvolution(LAYERS, **options)
    whole = ExpertEvolution(LAYERS)
    whole.load(given.with_name("checkpoint-4"))
    train(dense, output, resumed, resume=str(given), data_seed=0)
    for expert, expected in zip(resumed.experts, whole.experts, strict=True):
        assert all(torch.equal(expert[name], expected[name]) for name in expected)


def test_experts_of_another_run_are_refused(dense, stopped):
    moved = stopped / "elsewhere" / "checkpoint-2"
    shutil.copytree(stopped / "one" / "checkpoint-2", moved)
    shutil.rmtree(stopped / "one")
    with pytest.raises(ValueError, match="evolved beside another expert 1.*resume_from"):
        train(dense, stopped / "other", ExpertEvolution(LAYERS), resume=str(moved))
    with pytest.raises(FileNotFoundError, match=f"No {EVOLUTION_FILE} in .*resume_from"):
        train(dense, stopped / "fresh", ExpertEvolution(LAYERS), resume=str(moved))


def test_the_best_model_at_the_end_takes_its_evolved_experts_along(dense, tmp_path):
    evolution = ExpertEvolution(LAYERS)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, use_cpu=True, report_to="none",
        per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2, save_steps=2,
        # The loss falls, so that the best checkpoint is not the last one.
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(model=dense, args=args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[evolution])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    first, last = (ExpertEvolution(LAYERS) for _ in range(2))
    first.load(tmp_path / "checkpoint-2")
    last.load(tmp_path / "checkpoint-4")
    for kept, best, other in zip(evolution.experts, first.experts, last.experts, strict=True):
        assert all(torch.equal(kept[name], best[name]) and not torch.equal(best[name], other[name]) for name in kept)
    moe = assemble(trainer.model, moe_config_of(), evolution)
    best = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    expected = assemble(best, moe_config_of(), first).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in moe.state_dict().items())


def test_a_seed_decides_the_betas(dense):
    before = {name: tensor + 1 for name, tensor in ExpertEvolution(LAYERS).snapshot(dense).items()}

    def evolved(seed):
        evolution = ExpertEvolution(LAYERS, seed=seed)
        evolution.start(dense)
        evolution.evolve(before, evolution.snapshot(dense))
        return evolution.experts[0]["1.down_proj.weight"]

    assert torch.equal(evolved(0), evolved(0)) and not torch.equal(evolved(0), evolved(1))


def test_a_checkpoint_of_other_layers_is_refused(dense, tmp_path):
    evolution = ExpertEvolution(LAYERS)
    evolution.start(dense)
    evolution.save(tmp_path)
    with pytest.raises(ValueError, match=r"of the layers \[1, 3\], expected 3 of \[1\]"):
        ExpertEvolution([1]).load(tmp_path)
    with pytest.raises(FileNotFoundError, match="not saved by an ExpertEvolution"):
        ExpertEvolution(LAYERS).load(tmp_path / "nowhere")


def test_impossible_settings_are_refused(dense):
    with pytest.raises(ValueError, match="a range"):
        ExpertEvolution([1], beta_ranges=[(0.9, 0.8)])
    with pytest.raises(ValueError, match="rule='mean'"):
        ExpertEvolution([1], rule="mean")
    with pytest.raises(ValueError, match="has the layers 0 to 3"):
        ExpertEvolution([4]).start(dense)
    with pytest.raises(ValueError, match="a MoE layer already"):
        ExpertEvolution([1]).start(HfMoeForConditionalGeneration(moe_config_of()))


def test_a_model_without_moe_layers_saves_loads_and_generates(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.glob("router_*.py")]
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.config.moe_layers() == [] and loaded.moe_layers() == {}
    torch.testing.assert_close(loaded(input_ids=ids).logits, dense(input_ids=ids).logits)
    assert loaded.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] <= 5
    assert loaded(input_ids=ids, labels=ids).aux_loss == 0


def test_the_assembled_moe_holds_the_dense_model_and_the_evolved_experts(dense, tmp_path):
    evolution = ExpertEvolution(LAYERS)
    train(dense, tmp_path, evolution)
    moe = assemble(dense, moe_config_of(), evolution)
    for layer in LAYERS:
        ffn, experts = dense.model.language_model.layers[layer].mlp, moe.moe_layers()[layer].experts
        assert torch.equal(experts.down_proj[0], ffn.down_proj.weight)
        for number, held in enumerate(evolution.experts, start=1):
            gate_up = torch.cat([held[f"{layer}.gate_proj.weight"], held[f"{layer}.up_proj.weight"]])
            assert torch.equal(experts.gate_up_proj[number], gate_up)
            assert torch.equal(experts.down_proj[number], held[f"{layer}.down_proj.weight"])
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    assert shared.keys() < moe.state_dict().keys()
    assert all(torch.equal(moe.state_dict()[name], tensor) for name, tensor in shared.items())


@pytest.mark.parametrize("model_type", ["llama", "llava", "qwen2_5_vl"])
def test_experts_evolve_and_assemble_on_a_host_in_place(model_type):
    dense = HfMoeForConditionalGeneration.from_host(small_host(model_type), moe_config={"layers": []})
    assert not dense.moe_layers()
    evolution = ExpertEvolution([0, 2])
    evolution.start(dense)
    config = HfMoeConfig.from_dict(
        {**dense.config.to_dict(), "moe_config": {"layers": [0, 2], "num_experts": 4, "num_experts_per_tok": 2}}
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        assert_near(assemble(dense, config, evolution)(input_ids=ids).logits, expected, 1e-5)
        for held in evolution.experts:
            for tensor in held.values():
                tensor += torch.randn(tensor.shape) * 0.1
    moe = assemble(dense, config, evolution)
    evolved = evolution.experts[1]["2.down_proj.weight"]
    assert torch.equal(moe.moe_layers()[2].experts.down_proj[2], evolved)
    assert_near(moe.moe_layers()[2].experts.down_proj[0], text_decoder(dense).layers[2].mlp.down_proj.weight)


def test_replicated_experts_compute_what_the_dense_model_does(dense):
    ids = torch.randint(0, 39, (2, 9), generator=torch.Generator().manual_seed(0))
    replicated = assemble(dense, moe_config_of(num_experts_per_tok=2, router="top_k"))
    assert_near(replicated(input_ids=ids).logits, dense.eval()(input_ids=ids).logits, 1e-5)
    noisy = assemble(dense, moe_config_of(num_experts_per_tok=2, router="top_k"), noise_std=0.1)
    experts = noisy.moe_layers()[1].experts.down_proj
    assert 0.9 < nn.functional.cosine_similarity(experts[0].flatten(), experts[1].flatten(), dim=0) < 0.999


def test_experts_that_do_not_fit_the_moe_are_refused(dense):
    evolution = ExpertEvolution(LAYERS)
    evolution.start(dense)
    for fields in ({"num_experts": 8}, {"num_shared_experts": 1}, {"granularity": 2}):
        with pytest.raises(ValueError, match="whole feed-forwards"):
            assemble(dense, moe_config_of(**fields), evolution)
    with pytest.raises(ValueError, match=r"evolved in the layers \[1, 3\], the MoE has \[0\]"):
        assemble(dense, config_of([0], num_experts=4), evolution)


class TwoTasks:
    """An FFN that has learnt task A goes on with A and B mixed, as expert 1."""

    def __init__(self):
        torch.manual_seed(0)
        self.ffn = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16))
        self.maps = torch.randn(2, 16, 16) / 2
        self.generator = torch.Generator().manual_seed(1)

    def batch(self, tasks):
        task = tasks[torch.randint(len(tasks), (128,), generator=self.generator)]
        x = torch.randn(128, 16, generator=self.generator)
        x[:, 0] = 3.0 * task - 1.5
        return x, torch.tanh(torch.einsum("bc,bcd->bd", x, self.maps[task]))

    def learn(self, tasks, steps, evolution=None):
        optimizer = torch.optim.AdamW(self.ffn.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            x, y = self.batch(torch.tensor(tasks))
            loss = (self.ffn(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            before = self.weights()
            optimizer.step()
            schedule.step()
            if evolution is not None:
                evolution.evolve(before, self.weights())

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.ffn.named_parameters()}

    def outputs(self, weights, tasks):
        x, y = self.batch(torch.tensor(tasks))
        with torch.no_grad():
            return torch.func.functional_call(self.ffn, weights, (x,)), y, self.ffn(x)


def distance(weights, start):
    return sum((weights[name] - start[name]).square().sum() for name in start).sqrt().item()


@pytest.mark.parametrize(("rule", "diverse"), [("delta", True), ("ema", False)])
def test_delta_keeps_the_experts_apart_and_ema_does_not(rule, diverse):
    toy = TwoTasks()
    toy.learn([0], 600)
    start = toy.weights()
    evolution = ExpertEvolution([], rule=rule)
    evolution.experts = [toy.weights() for _ in range(3)]
    error_before = (toy.outputs(start, [0])[0] - toy.outputs(start, [0])[1]).square().mean()
    toy.learn([0, 1], 600, evolution)
    cosines, distances = [], []
    for expert in evolution.experts:
        ours, _, first = toy.outputs(expert, [1])
        cosines.append(nn.functional.cosine_similarity(ours, first).mean().item())
        distances.append(distance(expert, start))
    if not diverse:
        assert min(cosines) > 0.99
        return
    assert max(cosines) < 0.8
    assert distances == sorted(distances) and distances[2] < 0.5 * distance(toy.weights(), start)
    for expert in evolution.experts[:1]:
        ours, target, _ = toy.outputs(expert, [0])
        assert (ours - target).square().mean() < 1.5 * error_before + 0.01
