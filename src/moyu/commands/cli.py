"""The `moyu` command: puts the commands together, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated, NoReturn

import typer

import moyu
from moyu.commands.bench import bench
from moyu.commands.calibrate import calibrate
from moyu.commands.chat import chat
from moyu.commands.coverage import coverage
from moyu.commands.doctor import doctor
from moyu.commands.eval import evaluate
from moyu.commands.fit import fit
from moyu.commands.generate import generate
from moyu.commands.info import info
from moyu.commands.methods import list_methods
from moyu.commands.pack import pack
from moyu.commands.profile import profile
from moyu.commands.report import report
from moyu.commands.run import run
from moyu.commands.serve import serve
from moyu.commands.study import study
from moyu.commands.trinity import trinity
from moyu.commands.zoo import train, zoo
from moyu.errors import UserError

STOPPED = 130  # exit code after Ctrl-C, 128 + SIGINT
MISTAKE = 2  # exit code after what the user can mend

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a language model without reading the weights that the next token does not need.\n\n"
    "A method decides what is skipped. `calibrate` fits it to a model and writes a plan; `generate` and `eval` read plans; "
    "`run` does everything and writes a report. Start with `moyu run` or `moyu generate`: both have a small model at hand. "
    "`moyu doctor` looks at this machine.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"moyu {moyu.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""


START, STEPS, RESEARCH, LISTS = "Start here", "One step at a time", "Research", "What there is"
app.command(rich_help_panel=START)(run)
app.command(rich_help_panel=START)(generate)
app.command(rich_help_panel=START)(chat)
app.command(rich_help_panel=START)(serve)
app.command(rich_help_panel=STEPS)(pack)
app.command(rich_help_panel=STEPS)(profile)
app.command(rich_help_panel=STEPS)(calibrate)
app.command(rich_help_panel=STEPS)(fit)
app.command(name="eval", rich_help_panel=STEPS)(evaluate)
app.command(rich_help_panel=STEPS)(bench)
app.command(rich_help_panel=STEPS)(report)
app.command(rich_help_panel=RESEARCH)(trinity)
app.command(rich_help_panel=RESEARCH)(study)
app.command(rich_help_panel=RESEARCH)(coverage)
app.command(name="methods", rich_help_panel=LISTS)(list_methods)
app.command(rich_help_panel=LISTS)(info)
app.command(rich_help_panel=LISTS)(doctor)
zoo_app = typer.Typer(invoke_without_command=True)
zoo_app.callback()(zoo)
zoo_app.command()(train)
app.add_typer(zoo_app, name="zoo", rich_help_panel=LISTS)


_NO_MEMORY = ("DefaultCPUAllocator", "out of memory")  # torch's words for it, on a CPU and on a GPU


def main(name: str = "moyu") -> None:
    """Run the command line: a user's mistake is one line and exit code 2, Ctrl-C is 130. name: what help calls the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        code = app(prog_name=name, standalone_mode=False)  # typer returns 130 for Ctrl-C, older versions raise
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except MemoryError:
        _fail("out of memory: use a smaller model or fewer tokens, or `--weights q8_0`")
    except BrokenPipeError:
        code = _read_enough()
    except SystemExit as stop:  # typer and rich make this of a closed pipe
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        code = _read_enough()
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        remedy = "free some disk, or choose another --out" if error.errno == errno.ENOSPC else "choose another --out"
        _fail(f"{error.strerror or error}{where}: {remedy}")
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY):
            _fail("out of memory: use a smaller model or fewer tokens, or `--weights q8_0`")
        if not (type(error).__module__.startswith(("typer", "click")) and hasattr(error, "format_message")):
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        if not message:  # no sub-command: the help is printed already
            sys.exit(MISTAKE)
        asked = getattr(error, "ctx", None)  # of the command whose line was read
        _fail(f"{message.rstrip('.')}: see `{asked.command_path if asked else name} -h`")
    if code == STOPPED:
        print("moyu: stopped", file=sys.stderr)
    if code:
        sys.exit(code)


def _read_enough() -> int:
    """The exit code where the reader of the output has gone, as `head` does: nothing went wrong."""
    if sys.__stdout__ is not None:  # Python's own last flush would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
    return 0


def _fail(message: str) -> NoReturn:
    print(f"moyu: error: {message}", file=sys.stderr)
    sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
