"""CLIP's weights, and checkpoints.

CLIP's own towers need neither timm nor transformers, whose imports, with the compiler that torchvision imports, take
longer than that of PyTorch.
"""

from adaclip_finetune.deferred import import_deferring

open_clip = import_deferring("open_clip", "timm", "transformers", "torch._dynamo.utils")
