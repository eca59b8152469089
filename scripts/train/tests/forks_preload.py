"""What every forked trainer has imported already."""

import os

from lora_train.__main__ import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import peft  # noqa: F401
import torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from lora_train import loop, reload  # noqa: F401
