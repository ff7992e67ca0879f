"""easy-VQA (Victor Zhou, 2019): questions about one coloured shape, out of the PyPI package `easy-vqa`."""

from datasets import Dataset, Features, Value

from .rows import ROW_FEATURES, question_messages


SHAPES = ("circle", "rectangle", "triangle")


def question_type(answer: str) -> str:
    """Return `"yes/no"`, `"shape"` or `"color"`."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


def load_easy_vqa(split: str) -> Dataset:
    """Load easy-VQA, one question a row: 38,575 in `train`, 9,673 in `test`.

    Columns: `messages`, `images`, `image_id` (unique over both splits), `question_type`, `answer`.

    Raises:
        ImportError: if `easy-vqa` is not installed.
        ValueError: if `split` is neither `train` nor `test`.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA comes from PyPI: pip install easy-vqa (or hf-moe[demo]).") from error
    loaders = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    if split not in loaders:
        raise ValueError(f"easy-VQA has the splits {', '.join(loaders)}, got {split!r}.")
    get_questions, get_paths = loaders[split]
    paths = get_paths()
    questions, answers, image_ids = get_questions()
    columns = {
        "messages": [question_messages(*pair) for pair in zip(questions, answers, strict=True)],
        "images": [[paths[image_id]] for image_id in image_ids],
        "image_id": [f"{split}/{image_id}" for image_id in image_ids],
        "question_type": [question_type(answer) for answer in answers],
        "answer": answers,
    }
    names = Features({name: Value("string") for name in ("image_id", "question_type", "answer")})
    return Dataset.from_dict(columns, features=Features({**ROW_FEATURES, **names}))
