"""Rows of messages and images: where they come from, how they become batches, features computed once."""

from .collator import VisionLanguageCollator
from .features import FeatureCache
from .host_features import HostFeatures
from .sources import load_rows
from .text import TextProcessor
from .tokenisation import tokenize_rows


__all__ = ["FeatureCache", "HostFeatures", "TextProcessor", "VisionLanguageCollator", "load_rows", "tokenize_rows"]
