"""Training, and the way to a model (`session.py`)."""

from adaclip_finetune.deferred import import_deferring

accelerate = import_deferring("accelerate", "boto3")  # for SageMaker
