"""Model files: Hugging Face folders, LoRA adapters, names, vocabularies, the adapter's own files."""
