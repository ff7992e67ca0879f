"""A model's weights as plain `Trainer` reads them back from a checkpoint, shared by the tests of hosts and towers."""

import torch
from transformers import Trainer, TrainingArguments


def assert_trainer_reads_back(model, folder, **options):
    """Check that every tensor of `model` comes back through `Trainer`'s own loading, bit for bit."""
    model.save_pretrained(folder, **options)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, TrainingArguments(str(folder / "run"), report_to=[], use_cpu=True))
    trainer.state.best_model_checkpoint = str(folder)
    for load in (lambda: trainer._load_from_checkpoint(str(folder)), trainer._load_best_model):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        load()
        read = model.state_dict()
        assert [name for name in saved if not torch.equal(read[name], saved[name])] == []
