import hashlib
import shutil
import socket
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request

import numpy as np
import pytest
from cases import each
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchssl.runtime.errors import DataError, UsageError
from patchssl.sets import download as module
from patchssl.sets.download import Wanted, _Failed, _Redirects, checksum, download

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Site:
    """A web server in a thread; how it answers is up to the test, what it was asked is noted."""

    def __init__(self):
        self.files = {"/file": CONTENT}
        self.ranges = True  # whether it answers for parts of a file
        self.statuses = []  # of the next answers, 200 after that
        self.cuts = []  # bytes after which the next answers break off
        self.redirect = {}
        self.chunked = False
        self.stall = 0.0  # seconds of silence before the content
        self.kind = "application/octet-stream"
        self.asked = []  # (path, Range)
        self.sent = 0  # bytes of content
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.answer(self)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request, client_address):  # a client that has hung up
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.address}/file"

    def answer(self, request):
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked))
        if request.path in self.redirect:
            return self.refuse(request, 302, Location=self.redirect[request.path])
        if request.path not in self.files:
            return self.refuse(request, 404)
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return self.refuse(request, status)
        content, start = self.files[request.path], 0
        if asked and self.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.refuse(request, 416, **{"Content-Range": f"bytes */{len(content)}"})
        request.send_response(206 if start else 200)
        request.send_header("Content-Type", self.kind)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header(*(("Transfer-Encoding", "chunked") if self.chunked else
                              ("Content-Length", str(len(content) - start))))
        request.end_headers()
        time.sleep(self.stall)
        rest = content[start:]
        cut = self.cuts.pop(0) if self.cuts else len(rest)
        self.sent += len(rest[:cut])
        if self.chunked:
            request.wfile.write(b"%x\r\n" % len(rest) + rest[:cut] + (b"\r\n0\r\n\r\n" if cut >= len(rest) else b""))
        else:
            request.wfile.write(rest[:cut])
        if cut < len(rest):
            request.close_connection = True

    def refuse(self, request, status, **headers):
        request.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            request.send_header(name, value)
        request.end_headers()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def second():
    site = Site()
    yield site
    site.close()


def fetch(urls, target, **known):
    urls = [urls] if isinstance(urls, str) else urls
    return download(urls, target, pause=0, **known)


def partial_of(target):
    return target.with_name(target.name + ".partial")


def test_a_file_arrives_whole_and_is_told_of(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 50_000)
    steps = []
    target = tmp_path / "new folder" / "data.bin"
    found = fetch(site.url, target, md5=MD5.upper(), sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT),
                  progress=lambda done, total: steps.append((done, total)))
    assert found == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert steps == sorted(steps) and len(steps) > 3
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert site.asked == [("/file", None)]


def test_a_file_that_is_there_is_not_asked_for(site, tmp_path):
    target = tmp_path / "data.bin"
    target.write_bytes(CONTENT)
    assert fetch(site.url, target, md5=MD5) == target
    target.write_bytes(b"mine")
    assert fetch(site.url, target) == target  # nothing is known that speaks against it
    with pytest.raises(DataError, match=rf"data.bin is there, but its md5 is .* instead of {MD5}: remove it"):
        fetch(site.url, target, md5=MD5)
    assert target.read_bytes() == b"mine"
    assert site.asked == []


def test_an_earlier_part_is_gone_on_with(site, tmp_path):
    target = tmp_path / "data.bin"
    partial_of(target).write_bytes(CONTENT[:HALF])
    fetch(site.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert site.asked == [("/file", f"bytes={HALF}-")]
    assert site.sent == len(CONTENT) - HALF


def test_a_server_that_cannot_go_on_begins_anew(site, tmp_path):
    site.ranges = False
    target = tmp_path / "data.bin"
    partial_of(target).write_bytes(CONTENT[:HALF])
    fetch(site.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert site.asked == [("/file", f"bytes={HALF}-")]


@pytest.mark.parametrize("before", [CONTENT + b"more", b"x" * (len(CONTENT) + 1)])
def test_a_part_longer_than_the_file_is_thrown_away(site, tmp_path, before):
    target = tmp_path / "data.bin"
    partial_of(target).write_bytes(before)
    fetch(site.url, target)  # without any checksum
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == [f"bytes={len(before)}-", None]


def test_a_complete_part_only_gets_its_name(site, tmp_path):
    target = tmp_path / "data.bin"
    partial_of(target).write_bytes(CONTENT)
    fetch(site.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert site.sent == 0


def test_a_part_of_another_file_is_fetched_once_anew(site, tmp_path):
    target = tmp_path / "data.bin"
    partial_of(target).write_bytes(b"x" * HALF)
    fetch(site.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == [f"bytes={HALF}-", None]


def test_after_a_break_the_rest_is_asked_for(site, tmp_path):
    site.cuts = [100_000, 50_000]
    target = fetch(site.url, tmp_path / "data.bin", md5=MD5)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_broken_answer_without_a_length_is_no_file(site, tmp_path):
    site.chunked, site.cuts = True, [1000]
    target = fetch(site.url, tmp_path / "data.bin")
    assert target.read_bytes() == CONTENT
    assert len(site.asked) == 2


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 60_000), max_size=6), ranges=st.booleans(), chunked=st.booleans(),
       before=st.integers(0, 310_000))
def test_whatever_breaks_the_file_is_right_in_the_end(site, tmp_path, monkeypatch, cuts, ranges, chunked, before):
    monkeypatch.setattr(module, "_GROWTH", 1)
    monkeypatch.setattr(module, "ATTEMPTS", 10)
    site.cuts, site.ranges, site.chunked = list(cuts), ranges, chunked
    target = tmp_path / "data.bin"
    partial_of(target).write_bytes((CONTENT + b"y" * 20_000)[:before])
    fetch(site.url, target, md5=MD5)
    assert target.read_bytes() == CONTENT
    target.unlink()


def test_breaks_without_progress_end_and_keep_what_came(site, tmp_path):
    site.cuts = [1000, 0, 0, 0, 0]
    target = tmp_path / "data.bin"
    with pytest.raises(DataError) as error:
        fetch(site.url, target, md5=MD5)
    text = str(error.value)
    assert f"{site.url}: the connection was cut off after 1,000 of 300,000 bytes (3 attempts)" in text
    assert f"save it as {target}; 1,000 bytes are in {partial_of(target)}" in text
    assert len(site.asked) == 3
    assert not target.exists()
    assert partial_of(target).read_bytes() == CONTENT[:1000]
    fetch(site.url, target, md5=MD5)  # the next run, with the server as before
    assert target.read_bytes() == CONTENT


def test_attempts_count_from_the_last_progress(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROWTH", 1000)
    site.cuts = [1000] * 20
    assert fetch(site.url, tmp_path / "data.bin", md5=MD5).read_bytes() == CONTENT
    assert len(site.asked) == 21


def test_mirrors_are_tried_in_turn(site, second, tmp_path):
    site.files = {}
    target = fetch([f"{site.address}/a", second.url, site.url], tmp_path / "data.bin", md5=MD5)
    assert target.read_bytes() == CONTENT
    assert len(site.asked) == len(second.asked) == 1


def test_all_addresses_and_their_reasons_are_named(site, tmp_path):
    site.redirect = {"/login": f"{site.address}/form"}
    site.statuses = [401]
    with pytest.raises(DataError) as error:
        fetch([f"{site.address}/absent", site.url, f"{site.address}/login"], tmp_path / "data.bin")
    text = str(error.value)
    assert text.startswith("data.bin could not be fetched:\n")
    assert f"  {site.address}/absent: HTTP 404 Not Found\n" in text
    assert f"  {site.url}: HTTP 401 Unauthorized; the server asks for a login\n" in text
    assert f"  {site.address}/login: HTTP 404 Not Found\n" in text
    assert error.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again_but_not_for_ever(site, tmp_path):
    site.statuses = [503, 429, 200]
    assert fetch(site.url, tmp_path / "data.bin").read_bytes() == CONTENT
    site.statuses = [503] * 9
    with pytest.raises(DataError, match=r"HTTP 503 .* \(3 attempts\)"):
        fetch(site.url, tmp_path / "other.bin")
    assert len(site.asked) == 6


def test_wrong_bytes_never_get_the_name(site, second, tmp_path):
    site.files["/file"] = CONTENT[::-1]
    target = tmp_path / "data.bin"
    assert fetch([site.url, second.url], target, md5=MD5).read_bytes() == CONTENT
    target.unlink()
    with pytest.raises(DataError, match=rf"its md5 is \w+ instead of {MD5}, and it was thrown away"):
        fetch([site.url, site.url], target, md5=MD5)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="its sha256 is"):
        fetch(site.url, target, sha256="0" * 64)


def test_a_file_of_another_size_is_not_even_begun(site, tmp_path):
    with pytest.raises(DataError, match="the file has 300,000 bytes there instead of 1,000"):
        fetch(site.url, tmp_path / "data.bin", size=1000)
    assert list(tmp_path.iterdir()) == []
    site.chunked = True  # the size is seen at the end
    with pytest.raises(DataError, match="it has 300,000 bytes instead of 1,000"):
        fetch(site.url, tmp_path / "data.bin", size=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_web_page_is_no_file(site, tmp_path):
    site.kind = "text/html; charset=utf-8"
    with pytest.raises(DataError, match="a web page and not the file: perhaps the file has moved, or a login"):
        fetch(site.url, tmp_path / "data.bin")
    assert list(tmp_path.iterdir()) == []


def test_redirections_are_followed_with_the_part_asked_for(site, second, tmp_path):
    site.redirect = {"/old": "/older", "/older": second.url}
    target = tmp_path / "data.bin"
    partial_of(target).write_bytes(CONTENT[:HALF])
    fetch(f"{site.address}/old", target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert second.asked == [("/file", f"bytes={HALF}-")]


def test_a_circle_of_redirections_ends(site, tmp_path):
    site.redirect = {"/file": "/file"}
    with pytest.raises(DataError, match="HTTP 302"):
        fetch(site.url, tmp_path / "data.bin")


@pytest.mark.parametrize("goal", ["file:///etc/hostname", "ftp://127.0.0.1/file", "data:,hello"])
def test_redirections_stay_on_the_web(site, tmp_path, goal):
    site.redirect = {"/file": goal}
    with pytest.raises(DataError, match=r"could not be fetched:\n  http://127"):
        fetch(site.url, tmp_path / "data.bin")
    assert list(tmp_path.iterdir()) == []


def test_encryption_is_not_given_up_on_the_way():
    def follow(here, there):
        return _Redirects().redirect_request(Request(here), None, 302, "Found", {}, there)

    with pytest.raises(_Failed, match="it leads to http://b/x, which is not encrypted"):
        follow("https://a/x", "http://b/x")
    assert follow("https://a/x", "https://b/x").full_url == "https://b/x"
    assert follow("http://a/x", "http://b/x").full_url == "http://b/x"
    assert follow("http://a/x", "https://b/x").full_url == "https://b/x"


def test_without_a_connection_there_is_one_try(tmp_path):
    closed = Site()
    closed.close()
    with pytest.raises(DataError, match=rf"{closed.url}: no connection: .*refused"):
        fetch(closed.url, tmp_path / "data.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_is_lost_on_the_way_is_tried_for_again(tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/file"

    def answer_once():
        with listener:
            connection, _ = listener.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")

    thread = threading.Thread(target=answer_once)
    thread.start()
    with pytest.raises(DataError, match=r"no connection: .*refused.* \(3 attempts\)"):
        fetch(address, tmp_path / "data.bin")
    thread.join()
    assert partial_of(tmp_path / "data.bin").read_bytes() == b"half"


def test_silence_ends(site, tmp_path):
    site.stall = 1.0
    with pytest.raises(DataError, match=r"the connection broke after 0 bytes: .*timed out.* \(3 attempts\)"):
        download([site.url], tmp_path / "data.bin", pause=0, timeout=0.05)
    assert len(site.asked) == 3


def test_a_disk_without_room_is_said_before_it_is_filled(site, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DataError, match=rf"{tmp_path} has 1,000 bytes free, and 300,000 are needed for {site.url}"):
        fetch(site.url, tmp_path / "data.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("place", "reason"), [("/dev/full", "No space left"), ("absent/folder", "No such file")])
def test_what_cannot_be_written_is_no_fault_of_the_network(site, tmp_path, place, reason):
    target = tmp_path / "data.bin"
    partial_of(target).symlink_to(place)
    with pytest.raises(DataError, match=rf"data.bin.partial cannot be written: {reason}"):
        fetch(site.url, target)
    assert len(site.asked) == 1


@each("url", ["file:///etc/hostname", "ftp://a/b", "data.bin", ""])
def test_only_addresses_of_the_web(tmp_path, url):
    with pytest.raises(UsageError, match="is no address of a file on the web"):
        fetch(url, tmp_path / "data.bin")


def test_checksums_of_known_content(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert checksum(path, "md5") == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321
    assert checksum(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert Wanted(md5="900150983cd24fb0d6963f7d28e17f72", size=3).objection(path) is None
    assert Wanted(size=4).objection(path) == "it has 3 bytes instead of 4"
    assert Path(path).exists()
