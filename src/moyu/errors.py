"""The one kind of error that a user's input causes."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used: what was wrong, and the next step."""

    def __init__(self, problem: str, next_step: str = "") -> None:
        """`problem` says what and where, `next_step` what to do about it."""
        super().__init__(f"{problem}: {next_step}" if next_step else problem)
        self.problem = problem
        self.next_step = next_step
