from helpers.adapter_fixtures import image_rows, llama, own_model, randomise, text, vit  # noqa: F401
