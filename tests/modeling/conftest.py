from helpers.model_fixtures import batch, make_batch, rows, text_batch, tiny_config, tiny_model, training_batch  # noqa: F401
