"""The model: the waist, the mechanisms, and the classes that Transformers loads."""
