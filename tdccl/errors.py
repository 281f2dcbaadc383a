"""The errors of tdccl. Each says what was given, what was expected, and what to do."""


class TdcclError(RuntimeError):
    """Base of all errors of tdccl."""


class ArgumentError(TdcclError, ValueError):
    """A call was refused before anything was launched; the communicator can go on."""


class Mismatch(ArgumentError):
    """With TDCCL_DEBUG=1: the ranks were about to make different calls; none was launched, and all ranks raise it."""


class InitError(TdcclError):
    """A communicator could not be made: ranks are missing, or disagree, or memory cannot be shared.

    absent  the ranks that did not come, if that is why
    """

    absent: tuple[int, ...] = ()


class DestroyedError(TdcclError):
    """A communicator was used after `destroy()`."""


class _FaultOfARank(TdcclError):
    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


class Timeout(_FaultOfARank):
    """A kernel gave up waiting for rank `rank`; the communicator can no longer be used, but shrunk."""


class PeerFailure(_FaultOfARank):
    """The process of rank `rank` has ended; the communicator can no longer be used, but shrunk."""


class Aborted(_FaultOfARank):
    """The communicator was aborted by rank `rank`; it can no longer be used."""
