"""Parameter-efficient finetuning of CLIP for text-video retrieval."""

__version__ = "0.1.0"
