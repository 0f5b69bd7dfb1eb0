"""Which errors are the disk's. What becomes of a run by them: tests/faults/test_disk.py."""

import errno
import socket
import ssl

import pytest

from daemon.disk import is_disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EDQUOT, errno.EIO])
def test_what_files_raise_is_trouble_with_the_disk(number: int) -> None:
    assert is_disk(OSError(number, "of a file"))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "of a socket"),
        TimeoutError(errno.ETIMEDOUT, "of a socket"),
        ssl.SSLError(1, "of a handshake"),
        socket.gaierror(socket.EAI_NONAME, "of a name server"),
        OSError("of a library"),
        ValueError("of ours"),
    ],
)
def test_what_sockets_raise_is_not(error: Exception) -> None:
    assert not is_disk(error)
