"""Every error shardwise raises on purpose.

A message says three things: what was given, the rule it breaks, and what to do. The three roots map to the exit codes
of the command line: `UserError` to 2, `RunFailed` and `Refused` to 1.
"""


class ShardwiseError(Exception):
    """Root of the tree; never raised itself."""


class UserError(ShardwiseError):
    """The input is wrong: an option, a job file, a data folder. Exit code 2."""


class JobError(UserError):
    """The job cannot be loaded or its fields contradict each other."""


class DataError(UserError):
    """A data file is missing, corrupt or not of the form its reader expects; the message names the file."""


class PlanError(UserError):
    """A plan or layout is malformed, or asks for what this model, job or machine cannot do."""


class FolderError(UserError):
    """The run folder is in use, is not a run folder, or holds a run that does not match."""


class CheckpointError(FolderError):
    """A checkpoint is damaged, does not fit the model or optimizer, or cannot be written."""


class RunFailed(ShardwiseError):
    """A training that started did not finish. Exit code 1.

    Attributes:
        rank: the global rank that failed first, or None when unknown.
        details: that rank's own traceback or exit signal, as text.
    """

    def __init__(self, message: str, *, rank: int | None = None, details: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.details = details


class Stopped(ShardwiseError):
    """The run was interrupted by a signal after saving a checkpoint; `--resume` continues it. Exit code 1."""


class TaskFailed(RunFailed):
    """A task has no result: it raised, took too long, was killed or filled its memory. Exit code 1.

    Attributes:
        kind: what happened, one word of `shardwise.tasks.TaskFailure.kind`.
        details: the task's own traceback, where it has one.
    """

    def __init__(self, message: str, *, kind: str = "error", details: str = "") -> None:
        super().__init__(message, details=details)
        self.kind = kind
