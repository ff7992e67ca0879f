"""Two tasks that contradict each other: the same yes-no questions, answered truthfully or with a lie.

The instruction, a system turn, says which. Whoever mixes the two up answers at chance. No word of the test questions
occurs in the training questions.
"""

from datasets import Dataset, Features, Value

from .rows import MESSAGES, text_part


# The id of a task, as routers by condition read it, is its position here.
INSTRUCTIONS = {"truth": "Answer truthfully.", "lie": "Answer with a lie."}
TASK_WORDS = {
    "an animal": "dog cat horse cow sheep pig lion tiger bear wolf fox rabbit mouse elephant monkey frog snake eagle "
    "duck shark whale goat deer camel",
    "a fruit": "apple banana orange pear peach plum grape cherry lemon lime mango melon strawberry raspberry "
    "blueberry pineapple apricot fig kiwi papaya grapefruit coconut watermelon tangerine",
    "a vehicle": "car bus truck train bicycle motorcycle airplane helicopter boat ship tram taxi van scooter tractor "
    "submarine rocket ferry ambulance limousine jeep yacht canoe minibus",
    "a tool": "hammer screwdriver saw wrench drill chisel shovel rake axe pliers crowbar spanner trowel sander mallet "
    "hoe pickaxe hacksaw clamp ruler scissors knife spade ladder",
    "a garment": "shirt jacket sweater dress skirt coat hat scarf glove sock shoe boot belt tie vest blouse hoodie "
    "raincoat sandal cap robe kimono swimsuit cardigan",
    "an instrument": "piano guitar violin flute drum trumpet cello harp clarinet saxophone trombone banjo oboe "
    "accordion tuba bassoon mandolin ukulele harmonica viola lute organ xylophone tambourine",
}
TEST_WORDS = 8  # the last ones of every category


def load_opposite_tasks(split: str) -> Dataset:
    """Load the questions with both instructions, one row each: 384 in `train`, 192 in `test`.

    Columns: `messages`, `question_type` (the name of the task), `task_ids` (its number), `answer` (`yes` or `no`, half
    of the rows each).

    Raises:
        ValueError: if `split` is neither `train` nor `test`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The opposite tasks have the splits train, test, got {split!r}.")
    rows = []
    for question, truth in questions(split):
        for number, (task, instruction) in enumerate(INSTRUCTIONS.items()):
            answer = "yes" if truth == (task == "truth") else "no"
            turns = {"system": instruction, "user": question, "assistant": answer}
            messages = [{"role": role, "content": [text_part(text)]} for role, text in turns.items()]
            rows.append({"messages": messages, "question_type": task, "task_ids": number, "answer": answer})
    names = {"question_type": Value("string"), "task_ids": Value("int64"), "answer": Value("string")}
    return Dataset.from_list(rows, features=Features({"messages": MESSAGES, **names}))


def questions(split: str) -> list[tuple[str, bool]]:
    """Return questions and whether yes is true: two for every word, of its own category and of another one."""
    rows = []
    categories = list(TASK_WORDS)
    for number, (category, listed) in enumerate(TASK_WORDS.items()):
        words = listed.split()
        for position, word in enumerate(words[-TEST_WORDS:] if split == "test" else words[:-TEST_WORDS]):
            other = categories[(number + 1 + position % (len(categories) - 1)) % len(categories)]
            article = "an" if word[0] in "aeiou" else "a"
            rows += [(f"Is {article} {word} {category}?", True), (f"Is {article} {word} {other}?", False)]
    return rows
