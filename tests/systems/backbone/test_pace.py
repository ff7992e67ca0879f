"""PaCE: experts by segment, added one after the other as copies of those that are there."""

import pytest
import torch
from helpers.near import assert_near
from transformers import LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.expert_banks import edit_banks
from hf_moe.data.segments import segment_ids
from hf_moe.training.parts import train_only


WORDS, USER, ASSISTANT = 32, 30, 31
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
CAPTIONS = {"layers": "except_last_1"}


def build(variant="pairs"):
    torch.manual_seed(0)
    text = LlamaConfig(**SIZES, vocab_size=WORDS, pad_token_id=0)
    config = HfMoeConfig.from_system("pace", variant=variant, text_config=text, moe_config=CAPTIONS)
    return HfMoeForConditionalGeneration(config).eval()


def rows(segment, rows=16, seed=0, noise=0.1):
    """Chains of words, which are the same in captions and in dialogues but for some."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(29, (rows, 16), generator=generator)
    for place in range(1, 16):
        shift = 3 if segment == 1 else 3 + 4 * (ids[:, place - 1] % 7 == 0).long()
        kept = torch.rand(rows, generator=generator) > noise
        ids[:, place] = torch.where(kept, (ids[:, place - 1] * 5 + shift) % 29, ids[:, place])
    return {"input_ids": ids, "condition_ids": {"segment": torch.full_like(ids, segment)}}


def train(model, parts, segment, steps, goal=0.0, rate=5e-3):
    """Return after how many steps the mean of five losses is below the goal."""
    train_only(model, parts)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        batch = rows(segment, seed=step)
        losses.append(model(**batch, labels=batch["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step > 4 and sum(losses[-5:]) / 5 < goal:
            break
    return step


def test_every_token_has_the_expert_of_its_segment():
    ids = torch.tensor([[5, USER, 6, 7, 7, ASSISTANT, 8], [USER, 1, ASSISTANT, 2, USER, 3, 4]])
    modality = (ids == 7).long()
    segments = segment_ids(ids, {USER: 2, ASSISTANT: 3}, first=1, modality_ids=modality, image=0)
    assert segments.tolist() == [[1, 2, 2, 0, 0, 3, 3], [2, 2, 3, 3, 2, 2, 2]]
    model = build("dialogue")
    routing = model(input_ids=ids, condition_ids={"segment": segments}, output_routing=True).routing
    expected = torch.tensor([0, 1, 2, 2])[segments].flatten()
    assert list(routing.decisions) == [0, 1, 2]
    assert all(torch.equal(decision.expert_index[:, 0], expected) for decision in routing.decisions.values())


def test_what_is_generated_goes_on_in_the_last_segment():
    model, ids = build("dialogue"), rows(1, rows=2)["input_ids"].clamp(min=1)
    prompt = torch.cat([torch.ones(2, 15).long(), torch.full((2, 1), 3)], 1)
    found = model.generate(ids, condition_ids={"segment": prompt}, max_new_tokens=4, do_sample=False)
    segments = torch.cat([prompt, torch.full((2, 4), 3)], 1)
    with torch.no_grad():
        logits = model(input_ids=found, condition_ids={"segment": segments}).logits
    assert torch.equal(logits[:, 15:-1].argmax(-1), found[:, 16:])
    with pytest.raises(ValueError, match="'segment' has values for 16 tokens, and the call has 20"):
        model(input_ids=found, condition_ids={"segment": prompt})


def test_a_context_expert_that_begins_as_the_caption_expert_learns_faster():
    model = build()
    train(model, ["experts", "backbone", "embeddings"], 1, 60)
    steps = {}
    for start in ("caption", "fresh"):
        torch.manual_seed(1)
        copy = HfMoeForConditionalGeneration(HfMoeConfig.from_dict(model.config.to_dict()))
        copy.load_state_dict(model.state_dict())
        edit_banks(copy, {"image": "image", "caption": "caption", "context": "caption"}, rule=[0, 1, 2, 2])
        before = {name: p.clone() for name, p in copy.named_parameters() if ".context." not in name}
        if start == "fresh":
            for block in copy.moe_layers().values():
                block.experts.context.initialize(0.02)
        steps[start] = train(copy, ["experts/context.*"], 3, 200, goal=1.1, rate=1e-3)
        assert all(torch.equal(p, before[name]) for name, p in copy.named_parameters() if name in before)
    assert steps["caption"] < 0.8 * steps["fresh"] < 200


def test_experts_that_a_task_does_not_use_can_go():
    model, batch = build("dialogue"), rows(1)
    with torch.no_grad():
        before = model(**batch).logits
        edit_banks(model, {"caption": "caption"}, rule=[-1, 0, -1, -1])
        assert_near(model(**batch).logits, before, 0)
    assert sum("experts" in name for name, _ in model.named_parameters()) == 3 * 2
