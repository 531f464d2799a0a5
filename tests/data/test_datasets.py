"""Downloads from a server of this test's own: resumed, checked, refused."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet
import pytest

from pinet_fast.data import datasets, prepare
from pinet_fast.errors import ConfigError, DataError

TEXT = "".join(f"{n // 7} {n % 50 + 1}\n" for n in range(40_000)).encode()
HALF = len(TEXT) // 2


class Server:
    """What the server does next, and what it was asked."""

    content, etag = TEXT, '"one"'
    resumes, breaks_at = True, None

    def __init__(self):
        self.asked = []


@pytest.fixture
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            if self.path == "/missing":
                self.send_error(404)
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
            is_same = self.headers.get("If-Range", state.etag) == state.etag
            if not (state.resumes and is_same):
                start = 0
            if wanted and start >= len(state.content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(state.content) - start))
            self.send_header("ETag", state.etag)
            self.end_headers()
            self.wfile.write(state.content[start : state.breaks_at])

        def log_message(self, *args):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{listening.server_port}"
    yield state
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture
def known(server, monkeypatch):
    """Return a function that puts a data set on the server into the registry."""

    def add(content=TEXT, pinned=True, path="/log.txt", **options):
        server.content = content
        digest = hashlib.sha256(content).hexdigest() if pinned else None
        one = datasets.Dataset(f"{server.url}{path}", digest, "ask first", **options)
        monkeypatch.setitem(datasets.DATASETS, "toy", one)

    return add


def fetch(folder, **options):
    return datasets.fetch("toy", folder, accept_licence=True, **options)


def test_download_becomes_a_log(known, server, tmp_path):
    known()
    seen = []
    found = fetch(tmp_path / "new", on_progress=lambda share, text: seen.append(share))
    assert found.download.read_bytes() == TEXT
    assert found.pinned
    assert seen[-1] == 1.0
    store = prepare(found.log, store_dir=tmp_path)
    assert (store.num_events, store.num_items) == (40_000, 50)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["toy-log.txt", "toy.parquet"]
    fetch(tmp_path / "new")
    assert server.asked == [None]


def test_broken_download_goes_on_where_it_broke(known, server, tmp_path):
    known()
    server.breaks_at = HALF
    with pytest.raises(DataError, match=f"broke off .*go on from byte {HALF:,}"):
        fetch(tmp_path)
    assert not (tmp_path / "toy-log.txt").exists()
    server.breaks_at = None
    assert fetch(tmp_path).download.read_bytes() == TEXT
    assert server.asked == [None, f"bytes={HALF}-"]


def test_server_that_cannot_resume_sends_all_again(known, server, tmp_path):
    known()
    server.breaks_at, server.resumes = HALF, False
    with pytest.raises(DataError, match="broke off"):
        fetch(tmp_path)
    server.breaks_at = None
    assert fetch(tmp_path).download.read_bytes() == TEXT


def test_file_that_changed_between_is_not_patched_together(known, server, tmp_path):
    known(pinned=False)
    server.breaks_at = HALF
    with pytest.raises(DataError, match="broke off"):
        fetch(tmp_path)
    server.breaks_at, server.etag, server.content = None, '"two"', TEXT[::-1].strip() + b"\n"
    found = fetch(tmp_path)
    assert found.download.read_bytes() == server.content
    assert not found.pinned


def test_whole_part_needs_no_more_bytes(known, tmp_path):
    known()
    (tmp_path / "toy-log.txt.part").write_bytes(TEXT)
    assert fetch(tmp_path).download.read_bytes() == TEXT


def test_wrong_checksum_is_refused_and_deleted(known, server, tmp_path):
    known()
    server.content = TEXT[:-1] + b"!"
    with pytest.raises(DataError, match=r"expected sha256 .*was deleted: fetch it again"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.content = TEXT
    found = fetch(tmp_path)
    found.download.write_bytes(b"changed later")
    with pytest.raises(DataError, match="expected sha256"):
        fetch(tmp_path)


def test_without_a_pinned_checksum_the_first_download_is_trusted(known, server, tmp_path):
    known(pinned=False)
    found = fetch(tmp_path)
    record = tmp_path / "toy-log.txt.sha256"
    digest = hashlib.sha256(TEXT).hexdigest()
    assert (found.known, found.pinned, found.sha256) == ("first", False, digest)
    assert record.read_text() == f"{digest}  toy-log.txt\n"
    assert fetch(tmp_path).known == "recorded"
    found.download.unlink()
    assert fetch(tmp_path).known == "recorded"
    # Another content later, on disk or from the server, is refused until the record goes.
    found.download.write_bytes(b"1 2\n")
    with pytest.raises(DataError, match=r"that of the first download, .*delete .*sha256 to trust"):
        fetch(tmp_path)
    server.content = b"1 2\n1 3\n"
    with pytest.raises(DataError, match="that of the first download"):
        fetch(tmp_path)
    assert not found.download.exists()
    record.unlink()
    again = fetch(tmp_path)
    assert again.known == "first"
    assert pyarrow.parquet.read_table(again.log).num_rows == 2, "the log is that of the download"


def test_zip_with_a_long_delimiter(known, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("in/ratings.dat", "1::5::4::100\n1::6::3::101\n")
    columns = ("user", "item", "rating", "timestamp")
    known(packed.getvalue(), columns=columns, delimiter="::", member="in/ratings.dat")
    table = pyarrow.parquet.read_table(fetch(tmp_path).log)
    assert table.to_pydict() == {"user": [1, 1], "item": [5, 6], "rating": [4, 3],
                                 "timestamp": [100, 101]}  # fmt: skip


def test_file_of_another_kind_is_refused(known, tmp_path):
    known(b"<html>moved</html>", pinned=False, member="in/ratings.dat")
    with pytest.raises(DataError, match="is not the file expected"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refusals_are_one_line(known, server, tmp_path):
    known(path="/missing")
    with pytest.raises(DataError, match="answered 404"):
        fetch(tmp_path)
    with pytest.raises(ConfigError, match=r"expected one of ml-100k, .*toy"):
        datasets.fetch("none", tmp_path, accept_licence=True)
    with pytest.raises(ConfigError, match=r"ask first.*--accept-licence"):
        datasets.fetch("toy", tmp_path, accept_licence=False)
    with pytest.raises(ConfigError, match=r"GroupLens.*no checksum is pinned.*--accept-licence"):
        datasets.fetch("ml-1m", tmp_path, accept_licence=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        fetch(tmp_path / "file")
    known()
    server.url = "http://127.0.0.1:9"  # nobody listens there
    known()
    with pytest.raises(DataError, match="broke off"):
        fetch(tmp_path / "x")
