"""Rows of text and images for the tiny models: four placeholders an image."""

import torch


IMAGE, PAD = 95, 0


def row(images, length, seed):
    """Return one row of `length` text tokens around `images` images of four placeholders."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (length,), generator=generator)
    spans = [word for _ in range(images) for word in [IMAGE] * 4 + [7]]
    ids = torch.cat([words[:2], torch.tensor(spans, dtype=torch.long), words[2:]])
    return {"input_ids": ids, "pixel_values": torch.randn(images, 3, 16, 16, generator=generator)}


def collate(rows, side="left"):
    """Pad rows into a batch; labels are the tokens that are neither padding nor image."""
    width = max(len(item["input_ids"]) for item in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for index, item in enumerate(rows):
        length = len(item["input_ids"])
        columns = slice(width - length, None) if side == "left" else slice(0, length)
        ids[index, columns], mask[index, columns] = item["input_ids"], 1
    batch = {"input_ids": ids, "attention_mask": mask}
    pixels = torch.cat([item["pixel_values"] for item in rows])
    return {**batch, "pixel_values": pixels} if len(pixels) else batch


def labels_of(batch):
    """Label every token that is neither padding nor image nor the first of its row, which nothing predicts."""
    ignored = (
        (batch["attention_mask"].cumsum(-1) <= 1) | (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE)
    )
    return batch["input_ids"].masked_fill(ignored, -100)
