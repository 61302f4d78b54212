"""Runs one command and answers with an exit code. Nothing here imports torch by itself.

Exit codes: 0 finished; 143 stopped and saved; 2 bad configuration or data; 1 failed;
130 stopped with Ctrl-C before there was anything to save.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from deepclust.cli import commands
from deepclust.cli.help import help_text
from deepclust.cli.parser import BAD_INPUT, FAILED, INTERRUPTED, OK, say
from deepclust.errors import TRACEBACK, UserError, in_short


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Faults that the user can mend are printed as their message alone, faults of the program as one
    line; the environment variable DEEPCLUST_TRACEBACK adds the traceback.

    arguments: the words of the command; None = those that this process was started with.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except UserError as error:
        return say(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        advice = 'pip install -e ".[dev]" in a clone of the repository installs what is needed'
        return say(f"{error}; {advice}", FAILED)
    except KeyboardInterrupt:
        return say("stopped with Ctrl-C", INTERRUPTED)
    except BrokenPipeError:
        # The reader has left, as in `deepclust list head | head -1`. Python flushes stdout once
        # more when it exits, which would print a traceback; so the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        return say(_of_program(error), FAILED)


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return OK
    command = commands.find(words[0])
    return command(list(words[1:]))


def _of_program(error: Exception) -> str:
    """What is said of a fault of the program."""
    if os.environ.get(TRACEBACK):
        return traceback.format_exc()
    return f"failed: {in_short(error)}\n{TRACEBACK}=1 before the command shows the traceback"
