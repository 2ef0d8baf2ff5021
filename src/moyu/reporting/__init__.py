"""Reports: one HTML page, and the same tables in the terminal."""

from moyu.reporting.page import render, write_report, write_scoreboard
from moyu.reporting.terminal import tables

__all__ = ["render", "tables", "write_report", "write_scoreboard"]
