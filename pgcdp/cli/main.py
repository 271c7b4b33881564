"""Runs one command: finds its file, turns errors into messages and exit codes.

Exit codes are those of `pgcdp.errors`; besides, 130 after Ctrl-C and 143 after SIGTERM, both after cleaning up.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import NoReturn

import click

from pgcdp import __version__, log
from pgcdp.cli import screen
from pgcdp.errors import BugError, PgcdpError, TargetError, UsageError
from pgcdp.sets import root_directory

VERBS = (
    "protect",
    "unprotect",
    "up",
    "down",
    "status",
    "cut",
    "mark",
    "info",
    "show",
    "log",
    "find",
    "clone",
    "clones",
    "step",
    "destroy",
    "restore",
    "salvage",
    "verify",
    "check",
    "rebuild",
    "grow",
    "expire",
    "demo",
    "agent",
)
"""Every command, in the order of the help; each is a file beside this one with a `command` in it."""


class _Verbs(click.Group):
    """Imports a command's file when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = import_module(f"pgcdp.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", prog_name="pgcdp", message="%(prog)s %(version)s")
def pgcdp() -> None:
    """Continuous data protection for PostgreSQL: every write is captured, and any one of them can be restored.

    \b
    Begin with:
      pgcdp protect main --pgdata /var/lib/postgresql/15/main --store /backup/main --size 20G
      pgcdp status

    SET, the name of a volume set, may be left out when there is only one. State lies below /var/lib/pgcdp,
    /etc/pgcdp and /run/pgcdp, or below PGCDP_ROOT when that is set. Exit codes: 0 done, 2 wrong usage,
    3 no such target, 4 verification failed, 5 damage found, 6 a precondition is missing, 1 anything else.
    """


class Terminated(BaseException):
    """SIGTERM or SIGHUP came. Not an Exception, so that it passes through to the cleanups as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would end the cleanup half way
    raise Terminated(number)


def _not_raised(told: sys.UnraisableHookArgs) -> None:
    """An interrupt that came in a callback or a destructor, where Python drops it, comes again a moment later."""
    error = told.exc_value
    if isinstance(error, Terminated):
        signal.signal(error.number, _terminate)
        number = error.number
    elif isinstance(error, KeyboardInterrupt):
        number = int(signal.SIGINT)
    else:
        sys.__unraisablehook__(told)
        return
    again = Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


AGAIN_SECONDS = 0.05
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO)
"""What a disk that is full, fails or is gone answers."""


def run() -> NoReturn:
    """The program `pgcdp`. What it leaves in memory goes with the process: to take it down first takes up to 0.2 s."""
    gc.set_threshold(100_000)  # it makes lists of ten thousands and ends: to look for garbage in them takes as long
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. `arguments` lack the program's name; None: the process's own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = _wants_json(words)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    if arguments is None:
        sys.unraisablehook = _not_raised
    try:
        _start_log()
        code = pgcdp.main(words, prog_name="pgcdp", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        screen.error_text(error.format_message())
        return UsageError.exit_code
    except click.ClickException as error:
        return _fail(_usage_error(error), as_json)
    except PgcdpError as error:
        return _fail(error, as_json)
    except (KeyboardInterrupt, click.Abort):
        screen.interrupted()
        return 128 + signal.SIGINT
    except Terminated as end:
        screen.interrupted()
        return 128 + end.number
    except BrokenPipeError:
        # The reader of a pipe is gone (`pgcdp info | head`). Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(_of_a_disk(error) or _bug(error), as_json)


def _of_a_disk(error: Exception) -> PgcdpError | None:
    """What a disk did to a command, wherever that met it, is no bug."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in DISK_ERRORS:
        return None
    from pgcdp.fsio import NO_ROOM, told

    full = error.errno in NO_ROOM
    return PgcdpError(told(error), "make room there, and run this again" if full else "mend that, and run this again")


def _fail(error: PgcdpError, as_json: bool) -> int:
    if os.environ.get("PGCDP_DEBUG") == "1" and not isinstance(error, UsageError):
        traceback.print_exception(error.__cause__ if isinstance(error, BugError) and error.__cause__ else error)
    lines: list[str] = []
    if isinstance(error, TargetError) and error.candidates:
        from pgcdp.cli.log import candidates

        lines = candidates(error)
    screen.error(error, as_json, lines)
    return error.exit_code


def _bug(error: Exception) -> BugError:
    """What nobody foresaw. Its traceback is for the log, not for the terminal."""
    hint = "please report this with the traceback, which PGCDP_DEBUG=1 prints"
    try:
        file = _log_file()
        log.start(file)
        log.get(__name__).error("unexpected error", exc_info=error)
        hint = f"please report this with the traceback at the end of {file}"
    except (OSError, UsageError):
        pass
    bug = BugError(f"unexpected {type(error).__name__}: {error}".rstrip(": "), hint)
    bug.__cause__ = error
    return bug


def _log_file() -> Path:
    return root_directory() / "var/lib/pgcdp/pgcdp.log"


def _start_log() -> None:
    """The commands' log, where there is a place for it already: a mere question must not make directories."""
    logging.getLogger("pgcdp").addHandler(logging.NullHandler())
    file = _log_file()
    if file.parent.is_dir() and os.access(file.parent, os.W_OK):
        log.start(file)


def _wants_json(words: Sequence[str]) -> bool:
    """Whether errors are to be JSON, known before the arguments have been understood."""
    return "--output=json" in words or ("--output", "json") in pairwise(words)


def _usage_error(error: click.ClickException) -> UsageError:
    """click's complaint in our words: lower case, no full stop, and a hint."""
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "pgcdp"
    return UsageError(message, f"{command} --help shows the options and examples")


if __name__ == "__main__":
    sys.exit(main())
