"""Tokenizers of every kind, made on the spot."""

from itertools import product

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


TEXTS = [
    "User: what colour is this? Assistant: red", "system: be brief. assistant: blue and (green)",
    "is it 3.50 or 007 ?",
    "what colour is that? a circle, it seems", "user assistant system ask answer <|im_start|> <|im_end|>",
] * 3  # fmt: skip
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def _byte_level(prefix):
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return words, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)


def _metaspace(prefix, split=True, model=None):
    words = Tokenizer(model or models.BPE(unk_token="<unk>"))
    scheme = "first" if prefix else "never"
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    words.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    return words, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL)


def _unigram(prefix):
    words, _ = _metaspace(prefix, model=models.Unigram())
    return words, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")


def _word_piece(_):
    words = Tokenizer(models.WordPiece(unk_token="<unk>"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    return words, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)


def _word_level(_):
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words, trainers.WordLevelTrainer(special_tokens=SPECIAL)


KINDS = {
    "byte-level": _byte_level,
    "metaspace": _metaspace,
    "metaspace unsplit": lambda prefix: _metaspace(prefix, split=False),
    "unigram": _unigram,
    "word-piece": _word_piece,
    "word-level": _word_level,
}
HAVE_PREFIX = ("byte-level", "metaspace", "metaspace unsplit", "unigram")
ENDS = {"bare": "{0}", "bos": "<s> {0}", "eos": "{0} </s>", "bos and eos": "<s> {0} </s>"}
VARIANTS = [
    (kind, ends, prefix)
    for kind, ends, prefix in product(KINDS, ENDS, (False, True))
    if not prefix or kind in HAVE_PREFIX
]


def make_tokenizer(kind, ends="bare", prefix=False):
    """Return a tokenizer of a kind, and what it adds to each text."""
    words, trainer = KINDS[kind](prefix)
    trainer.show_progress = False
    words.train_from_iterator(TEXTS, trainer)
    if ends != "bare":
        single = ENDS[ends].format("$A").split()
        known = [(token, words.token_to_id(token)) for token in ("<s>", "</s>")]
        words.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        bos_token="<s>" if "bos" in ends else None,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer
