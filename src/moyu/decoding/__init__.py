"""Decode steps through whole decoder layers in one native call, for layers that are proved plain.

A plain layer is x + attention(norm(x)), then x + network(norm(x)). Each is proved in numbers: its own modules run once on a
few tokens, and the native step must give what they gave. Everything else of the model (embedding, masks, rotary angles,
final norm, head) runs as it is, and every layer that is not plain, every call that is not a decode step, and every step that
somebody watches through hooks takes the general path of `moyu.execution`.
"""

from .proof import plain_run
from .run import DecodeRun

__all__ = ["DecodeRun", "plain_run"]
