"""How the command line ends: here, and only here, an error becomes a message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from typer import Abort, TyperException
from typer.core import TyperGroup

from api.client_errors import ClientError, SearchCancelled, SearchFailed, Unreachable
from api.commands.console import WrongUse, print_problem
from search.errors import BitfrontierError


class ExitCode(IntEnum):
    """What a script learns from how a command ended."""

    DONE = 0
    UNEXPECTED = 1
    """Nobody foresaw it; or a process that was started on behalf of the command says so."""
    WRONG_USE = 2
    """Asked wrongly, or for what does not exist or may not be."""
    INFEASIBLE = 3
    """Nothing meets the budgets."""
    FAILED = 4
    """The search failed or was cancelled."""
    UNREACHABLE = 5
    """The service cannot be reached, or cannot answer now."""
    INTERRUPTED = 130
    """Ctrl-C."""


BY_TYPE = {"infeasible-budget": ExitCode.INFEASIBLE, "interrupted": ExitCode.INTERRUPTED}
AWAY = frozenset({429, 502, 503, 504})


def exit_code(error: ClientError | BitfrontierError) -> ExitCode:
    """The exit code of an error."""
    problem = problem_of(error)
    kind, status = str(problem["type"]).rpartition(":")[2], problem["status"]
    if kind in BY_TYPE:
        return BY_TYPE[kind]
    if isinstance(error, SearchFailed | SearchCancelled):
        return ExitCode.FAILED
    if status in AWAY:
        return ExitCode.UNREACHABLE
    return ExitCode.WRONG_USE if status < 500 else ExitCode.UNEXPECTED


def problem_of(error: ClientError | BitfrontierError) -> dict[str, Any]:
    """The problem document of an error."""
    if isinstance(error, BitfrontierError):
        return error.problem()
    problem = error.problem.model_dump(exclude_none=True)
    if isinstance(error, Unreachable):
        problem["detail"] += "; start one with 'bitfrontier up', or name another with --url"
    return problem


class Commands(TyperGroup):
    """The command line as a whole."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command and leave with its exit code; what went wrong is said on standard error."""
        given = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in given[: given.index("--") if "--" in given else None]
        try:
            code = super().main(given, *rest, **extra | {"standalone_mode": False})
        except (ClientError, BitfrontierError) as error:
            print_problem(problem_of(error), as_json=as_json)
            code = exit_code(error)
        except TyperException as error:
            print_problem(_wrong_use(error).problem(), as_json=as_json)
            code = ExitCode.WRONG_USE
        except Abort:
            code = ExitCode.INTERRUPTED
        sys.exit(int(code or 0))


def _wrong_use(error: TyperException) -> WrongUse:
    """What the parser of the command line did not understand."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    # No command at all: the help was printed.
    help = f" (see '{context.command_path} --help')" if context and message else ""
    return WrongUse(message.rstrip(".") + help)
