"""From dense models to a multimodal MoE: loading, upcycling, adopting, building."""
