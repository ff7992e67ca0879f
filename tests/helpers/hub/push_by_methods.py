"""Pushes with the methods of Transformers and PEFT, as a user's script does; see `test_by_name.py`.

Run as a program, `FOLDER`, with `HF_ENDPOINT` and `HF_TOKEN` set; what each repository must answer
is written to `FOLDER/<name>/reference.pt`.
"""

import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from helpers.hub.checkpoints import record, tiny_config, tiny_model, tiny_processor
from helpers.hub.odd_model import OddConfig, OddModel
from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig
from hf_moe.training.trainer import HfMoeTrainer


def main(root: Path) -> None:
    for name in ("methods", "trained", "complete", "adapter"):
        (root / name).mkdir()
    processor = tiny_processor()
    model = tiny_model(tiny_config(router="moiie", objectives={"load_balance": 0.01}))
    model.push_to_hub("owner/methods", max_shard_size="100KB")
    processor.push_to_hub("owner/methods")
    # Again, in one shard, and a card that somebody has written to.
    api = HfApi()
    card = ModelCard.load("owner/methods")
    card.text += "\nA word of my own.\n"
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="owner/methods")
    model.push_to_hub("owner/methods", tags=["small"])
    record(root / "methods", model, processor)

    base = HfMoeForConditionalGeneration.from_pretrained("owner/methods")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.push_to_hub("owner/adapter")
    record(root / "adapter", adapted.merge_and_unload(), processor)

    experts = MoeLoraConfig(target_modules=r".*language_model.*q_proj")
    get_peft_model(HfMoeForConditionalGeneration.from_pretrained("owner/methods"), experts).push_to_hub(
        "owner/experts"
    )
    OddModel(OddConfig()).push_to_hub("owner/odd")
    odd = OddModel.from_pretrained("owner/odd")
    get_peft_model(odd, MoeLoraConfig(target_modules=["mix"], router_input="target")).push_to_hub("owner/odd_experts")

    ids = torch.tensor([5, 6, 7, 8])
    options = {
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "hub_model_id": "owner/trained",
    }
    arguments = TrainingArguments(root / "trainer", **options)
    rows = [{"input_ids": ids, "labels": ids}] * 2
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    record(root / "trained", model, processor)

    arguments = TrainingArguments(root / "ours", **{**options, "hub_model_id": "owner/complete"})
    ours = HfMoeTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    ours.train()
    ours.push_to_hub(datasets=["easy-vqa"])
    record(root / "complete", model, processor)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
