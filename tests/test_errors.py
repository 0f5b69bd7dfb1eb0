"""Errors of the disk are told from those of sockets. Their effect on a run: tests/faults/test_disk.py."""

import errno
import socket
import ssl

import pytest

from daemon.errors import is_disk_error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EDQUOT, errno.EIO])
def test_errors_of_files_are_disk_errors(number: int) -> None:
    assert is_disk_error(OSError(number, "of a file"))


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
def test_errors_of_sockets_are_no_disk_errors(error: Exception) -> None:
    assert not is_disk_error(error)
