"""Decode steps through whole decoder layers in one native call, for layers that are proved plain.

A plain layer is x + attention(norm(x)), then x + network(norm(x)). Each is proved in numbers: its own modules run once on a
few tokens, and the native step must give what they gave. Where embedding, final norm and head are plain too, a step goes from
token ids to logits in one call; where they are not, they run as they are around the layers. A layer that is not plain, a call
that is not a decode step, and a step that somebody watches through hooks take the general path of `moyu.engine.executor`.
"""

from moyu.engine.steps.proof import plain_run
from moyu.engine.steps.run import DecodeRun
from moyu.engine.steps.whole import MOST_TOKENS, dense_step, whole_step

__all__ = ["MOST_TOKENS", "DecodeRun", "dense_step", "plain_run", "whole_step"]
