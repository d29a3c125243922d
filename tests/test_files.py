"""Does a file appear whole, or not at all, and does the error say how to fix it?"""

import errno
import os
from contextlib import suppress

import pytest

from dlhelpers.files import write_whole
from dlhelpers.lmdb_io import command_line, environments


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_where_there_is_no_room_the_old_file_stays_and_the_message_says_so(tmp_path, code):
    path = tmp_path / "report.html"
    path.write_text("old")

    def write(partial):
        with open(partial, "w") as file:
            file.write("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=r"no room for report.html in .*nothing replaced") as raised:
        write_whole(path, (), write)
    assert raised.value.errno == code
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text() == "old"


def test_another_error_stays_what_it_is(tmp_path):
    def write(partial):
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        write_whole(tmp_path / "a", (), write)


def test_too_many_open_files_are_called_that(tmp_path):
    import lmdb  # noqa: F401  before no file can be opened any more

    resource = pytest.importorskip("resource")
    (tmp_path / "a.lmdb").write_bytes(b"x" * 8192)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 8, limits[1]))
    try:
        with suppress(OSError):
            while True:
                used.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(
            OSError, match=r"too many files open: allow more .*ulimit.*shards"
        ) as told:
            environments.Environment(tmp_path / "a.lmdb")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in used:
            os.close(number)
    assert told.value.errno == errno.EMFILE


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://a:10001", "auto", "local"])
def test_an_address_of_ray_is_told_from_a_path(address):
    import argparse

    assert command_line._address(address) == address
    with pytest.raises(argparse.ArgumentTypeError, match="write --ray after SRC and DST"):
        command_line._address("photos")


def test_an_address_where_nothing_listens_is_refused_at_once():
    import socket

    from dlhelpers.lmdb_io import on_ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"ray://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"nothing answers at {address}"):
        on_ray._need_reachable(address)
    for other in ("", "auto", "local"):
        on_ray._need_reachable(other)
