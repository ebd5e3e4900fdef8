"""The ways in which a run ends before its end, each with its exit code; and what a request to stop breaks off."""

import errno

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class _Ending(Exception):
    exit_code: int

    def __init__(self, line: str, *, on_one_process: bool = False, bad_photo: tuple[str, int] | None = None) -> None:
        """line: one line, what is wrong, where, what to do. on_one_process: the other processes do not raise it.

        bad_photo: split and position of a photo that cannot be read.
        """
        super().__init__(" ".join(line.split()))
        self.on_one_process = on_one_process
        self.bad_photo = bad_photo


class UserError(_Ending):
    """Something that the person who started the run can put right."""

    exit_code = 2


class MachineError(_Ending):
    """A failure of the machine or of something that it reaches: disk, network, another process."""

    exit_code = 3


class Stopped(_Ending):
    """A stop on request: all is saved, and the same command goes on from there (75 is EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class StopAgreed(Exception):
    """All processes break off together, as a stop was asked for: what is done is to be saved, and Stopped raised."""


def is_disk_error(error: OSError) -> bool:
    """Whether a disk takes no more, as a full one; where something cannot be written for another reason, a name or a
    right is wrong."""
    return error.errno in _DISK_ERRORS


def write_error(error: OSError, line: str) -> UserError | MachineError:
    """What a script ends with where an output cannot be written."""
    return MachineError(line) if is_disk_error(error) else UserError(line)
