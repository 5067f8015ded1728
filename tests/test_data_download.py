"""Shards at http addresses: what refuses, does not answer, breaks off or is busy."""

import io
import os
import socket
import tarfile
import threading
from contextlib import contextmanager, suppress

import pytest
from PIL import Image

from mmrdpm.cli import main
from mmrdpm.data.records import Pair
from mmrdpm.data.sources import SourceConfig, download, open_source, webdataset
from mmrdpm.errors import DataError


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(download, "_STALL", 10)
    monkeypatch.setattr(download, "_PAUSE", 0.0)


@pytest.fixture
def impatient(monkeypatch):
    """For what stands still; who only answers late would be asked again."""
    monkeypatch.setattr(download, "_STALL", 1)


@pytest.fixture(scope="module")
def archive():
    """A shard of six pairs."""
    picture, whole = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (12, 8)).save(picture, "PNG")
    with tarfile.open(fileobj=whole, mode="w") as made:
        for name in (f"{i}.{kind}" for i in range(6) for kind in ("png", "txt")):
            content = picture.getvalue() if name.endswith("png") else b"one"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return whole.getvalue()


@contextmanager
def server(*answers):
    """An address where each connection gets the next answer: bytes, then no more but silence.

    Gives it with the first lines of what it was asked.
    """
    asked, kept = [], []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with suppress(OSError):  # shut down at the end
                for answer in answers:
                    connection, _ = listening.accept()
                    asked.append(connection.recv(65536).partition(b"\r\n")[0].decode())
                    connection.sendall(answer)
                    kept.append(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        finally:
            with suppress(OSError):  # closing alone does not wake the thread
                listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for connection in kept:
                connection.close()


def ok(content, size=None):
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (size or len(content)) + content


def moved(address):
    head = "HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\n"
    return f"{head}Location: {address}\r\n\r\n".encode()


BUSY = b"HTTP/1.1 %d Busy\r\nContent-Length: 0\r\n\r\n"


def records(url):
    return list(open_source("it", SourceConfig("webdataset", path=url)).shard(0))


def test_a_port_that_is_closed_is_one_line_with_the_cause(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/s.tar"
    assert main(["data", "inspect", url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mmrdpm: error: {url}: the shard could not be read (curl: Failed to c")
    assert "): check the address and the network; a run then goes on with --resume" in line


@pytest.mark.usefixtures("impatient")
def test_who_never_answers_is_asked_a_few_times_and_told(monkeypatch):
    monkeypatch.setattr(download, "_TRIES", 2)
    with server(b"", b"", b"") as (address, asked):
        with pytest.raises(DataError, match=r"s\.tar: .*\(curl: Operation too slow"):
            records(f"{address}/s.tar")
        assert asked == ["GET /s.tar HTTP/1.1"] * 2


def test_who_is_busy_for_a_while_is_asked_again(archive):
    with server(BUSY % 503, BUSY % 408, ok(archive)) as (address, asked):
        assert len(records(f"{address}/s.tar")) == 6 and len(asked) == 3


@pytest.mark.parametrize(
    ("said", "tries"),
    [("503", 3), ("503 Service Unavailable", 3), ("404 Not Found", 1), ("4290", 1)],
)
def test_of_what_curl_says_the_status_counts(said, tries, tmp_path, monkeypatch):
    """Some of its versions say the server's words behind it."""
    told = f"curl: (22) The requested URL returned error: {said}"
    (tmp_path / "curl").write_text(
        f"#!/bin/sh\necho >> {tmp_path}/tries\necho '{told}' >&2\nexit 22\n"
    )
    (tmp_path / "curl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DataError, match=f"error: {said}"):
        records("http://127.0.0.1:9/s.tar")
    assert len((tmp_path / "tries").read_text()) == tries


def test_settings_of_the_user_do_not_change_the_bytes(archive, tmp_path, monkeypatch):
    (tmp_path / ".curlrc").write_text(f'output = "{tmp_path}/elsewhere"\n')
    for home in ("HOME", "CURL_HOME"):
        monkeypatch.setenv(home, str(tmp_path))
    with server(ok(archive)) as (address, _):
        assert len(records(f"{address}/s.tar")) == 6
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_has_moved_is_followed_by_http_alone(archive):
    with server(ok(archive)) as (there, asked):
        with server(moved(f"{there}/t.tar")) as (address, _):
            assert len(records(f"{address}/s.tar")) == 6
        assert asked == ["GET /t.tar HTTP/1.1"]
        other = there.replace("http:", "ftp:")
        refused = pytest.raises(DataError, match=r"curl: Protocol .?ftp")
        with server(moved(f"{other}/t.tar")) as (address, _), refused:
            records(f"{address}/s.tar")
        assert len(asked) == 1


@pytest.mark.usefixtures("impatient")
def test_a_transfer_that_stands_still_is_told_and_not_begun_again(archive):
    """Its beginning would come twice, and pass for damage of the shard."""
    cut = 3 * len(archive) // 4
    with server(ok(archive[:cut], len(archive)), ok(archive)) as (address, asked):
        source = open_source("it", SourceConfig("webdataset", path=f"{address}/s.tar"))
        read = []
        with pytest.raises(DataError, match="Operation too slow"):
            read.extend(source.shard(0))
        assert len(asked) == 1 and read and all(isinstance(r, Pair) for r in read)


def test_a_transfer_that_is_left_in_its_midst_ends(archive, monkeypatch):
    opened = []

    class Remembered(download.Download):
        def __init__(self, url):
            super().__init__(url)
            opened.append(self)

    monkeypatch.setattr(webdataset, "Download", Remembered)
    monkeypatch.setattr(download, "_STALL", 600)
    with server(ok(archive, 2 * len(archive))) as (address, _):
        reader = open_source("it", SourceConfig("webdataset", path=f"{address}/s.tar")).shard(0)
        assert isinstance(next(reader), Pair)
        reader.close()
        (stream,) = opened
        with pytest.raises(OSError, match="curl: ended with status -9"):
            stream.read(1)


def test_an_empty_file_is_a_damaged_shard():
    with server(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as (address, _):
        (broken,) = records(f"{address}/s.tar")
        assert broken.cause == "damaged shard"


def test_an_address_is_no_command_and_its_blanks_and_letters_are_quoted(
    archive, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with server(ok(archive)) as (address, asked):
        assert len(records(f"{address}/a b'$(touch c);\u00e4[1]%20.tar?x=1&y=2")) == 6
    assert asked == ["GET /a%20b'$(touch%20c);%C3%A4[1]%20.tar?x=1&y=2 HTTP/1.1"]
    assert not list(tmp_path.iterdir())
