"""The retriever and its parts."""

from adaclip_finetune.weights import open_clip as open_clip  # before a part imports it with all that it imports
