"""The base of the errors whose message is written for a person, and the exit code of each."""


class ReportedError(Exception):
    """An error that says in words what is wrong and what to do: `str()` is the whole message.

    The `maml` command prints the message without a traceback and ends with `exit_code`:
    2, the input is wrong and nothing was started; 1, what was started has failed; 130, it was
    interrupted. A class of error that is not about wrong input sets another code than 2.
    """

    exit_code = 2
