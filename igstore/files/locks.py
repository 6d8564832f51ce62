"""The system's own locks (flock): it takes those of a process that dies, however it dies, so none is ever stale."""

from __future__ import annotations

import errno
import fcntl

# a file system without locks; EBADF where NFS wants a descriptor that writes, as there is none of a folder
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file or folder, as long as it is open; a lock that is held already is changed.

    Parameters
    ----------
    descriptor
        Of the file. Locks of two descriptors exclude each other, also within a process.
    shared
        Beside other shared ones, instead of alone.
    wait
        Until it is granted.

    Returns
    -------
    Whether it was granted; None where there are no locks.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True
