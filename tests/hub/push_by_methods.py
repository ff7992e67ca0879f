"""Pushes with the methods of Transformers and PEFT, as a user's script does; see `test_by_name.py`.

Run as a script, `push_by_methods.py FOLDER`, with `HF_ENDPOINT` and `HF_TOKEN` set; what each repository must answer
is written to `FOLDER/<name>/reference.pt`.
"""

import sys
from pathlib import Path

import torch
from hub_checkpoints import record, tiny_config, tiny_model, tiny_processor
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_moe import HfMoeForConditionalGeneration


def main(root: Path) -> None:
    for name in ("methods", "trained", "adapter"):
        (root / name).mkdir()
    processor = tiny_processor()
    model = tiny_model(tiny_config(router="moiie", objectives={"load_balance": 0.01}))
    model.push_to_hub("owner/methods", max_shard_size="100KB")
    processor.push_to_hub("owner/methods")
    record(root / "methods", model, processor)

    base = HfMoeForConditionalGeneration.from_pretrained("owner/methods")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.push_to_hub("owner/adapter")
    record(root / "adapter", adapted.merge_and_unload(), processor)

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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
