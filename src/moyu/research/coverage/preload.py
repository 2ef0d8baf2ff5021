"""Imports of the fork server, once for all types: torch on one thread, transformers without messages."""

import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

import moyu.research.coverage.checks  # noqa: F401

warnings.simplefilter("ignore")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
