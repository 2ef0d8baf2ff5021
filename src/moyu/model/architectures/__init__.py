"""Architectures that GGUF files may have: one file each, and this list. To add one, add a file and a line."""

from moyu.model.architectures.base import Architecture
from moyu.model.architectures.gemma2 import GEMMA2
from moyu.model.architectures.llama import LLAMA
from moyu.model.architectures.qwen2 import QWEN2
from moyu.model.architectures.qwen3 import QWEN3

ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in (LLAMA, QWEN2, QWEN3, GEMMA2)}
