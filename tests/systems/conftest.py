from helpers.adapter_fixtures import image_rows, llama, own_model, randomise, text, vit  # noqa: F401
from helpers.model_fixtures import batch, rows, tiny_config, tiny_model  # noqa: F401
