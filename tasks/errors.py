"""The base of the errors whose message is written for a person, and the exit code of each."""

from typing import Any

from tasks.credentials import redacted

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it: 128 + SIGINT."""

_LONGEST_LINE = 300  # characters of somebody else's message


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where there is no message.

    For messages of other libraries, which may run over pages; at most 300 characters, and without
    the credentials of addresses.
    """
    return redacted((str(error).strip() or type(error).__name__).splitlines()[0])[:_LONGEST_LINE]


class ReportedError(Exception):
    """An error that says in words what is wrong and what to do: `str()` is the whole message.

    The `maml` command prints the message without a traceback and ends with `exit_code`:
    2, the input is wrong and nothing was started; 1, what was started has failed; 130, it was
    interrupted. A class of error that is not about wrong input sets another code than 2. The
    credentials of addresses are left out of the message.
    """

    exit_code = 2

    def __init__(self, *arguments: Any):
        super().__init__(*(redacted(a) if isinstance(a, str) else a for a in arguments))
