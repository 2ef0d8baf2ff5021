"""Architectures that GGUF files may have: one file each, and this list. To add one, add a file and a line."""

from moyu.model.architectures.base import Architecture
from moyu.model.architectures.gemma import GEMMA
from moyu.model.architectures.gemma2 import GEMMA2
from moyu.model.architectures.gemma3 import GEMMA3
from moyu.model.architectures.gpt_oss import GPT_OSS
from moyu.model.architectures.granite import GRANITE
from moyu.model.architectures.llama import LLAMA
from moyu.model.architectures.mistral3 import MISTRAL3
from moyu.model.architectures.olmo2 import OLMO2
from moyu.model.architectures.phi3 import PHI3
from moyu.model.architectures.qwen2 import QWEN2
from moyu.model.architectures.qwen2moe import QWEN2MOE
from moyu.model.architectures.qwen3 import QWEN3
from moyu.model.architectures.qwen3moe import QWEN3MOE
from moyu.model.architectures.smollm3 import SMOLLM3

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        LLAMA, MISTRAL3, QWEN2, QWEN3, QWEN2MOE, QWEN3MOE, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE, SMOLLM3, GPT_OSS,
    )
}  # fmt: skip
