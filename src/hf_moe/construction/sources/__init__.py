"""One construction source per file; the file's name is the name users type."""
