"""Downloads from a real server that interrupts transfers, and damaged archives."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sis_lightning.datamodules import CIFAR100DataModule
from sis_lightning.datasets.download import Archive, download, extract, md5
from sis_lightning.errors import DataError

CONTENT = bytes(range(256)) * 5000


class Breaking(BaseHTTPRequestHandler):
    """Serves CONTENT, breaking off after `self.server.limit` bytes of each answer."""

    def do_GET(self):
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start = int(asked.group(1))
        content = self.server.content
        if start >= len(content):
            self.send_error(416)
            return
        self.server.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    server.content, server.limit, server.ranges, server.starts = CONTENT, 1 << 30, True, []
    server.url = f"http://127.0.0.1:{server.server_port}/archive.tar"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


SUM = hashlib.md5(CONTENT).hexdigest()


def test_an_interrupted_transfer_is_resumed(server, tmp_path):
    server.limit = 400_000
    target = download(server.url, tmp_path / "a.tar", SUM)
    assert target.read_bytes() == CONTENT
    assert server.starts == [0, 400_000, 800_000, 1_200_000]
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == [target]


def test_a_later_call_resumes_a_transfer(server, tmp_path):
    server.limit = 400_000
    with pytest.raises(DataError, match=r"broke off after 400,000 bytes(.|\n)*again to resume"):
        download(server.url, tmp_path / "a.tar", SUM, attempts=1)
    assert not (tmp_path / "a.tar").exists()
    server.limit = 1 << 30
    assert md5(download(server.url, tmp_path / "a.tar", SUM)) == SUM
    assert server.starts == [0, 400_000]


def test_a_server_that_cannot_resume_sends_the_whole_file(server, tmp_path):
    (tmp_path / "a.tar.part").write_bytes(b"old")
    server.ranges = False
    assert download(server.url, tmp_path / "a.tar", SUM).read_bytes() == CONTENT


def test_existing_files_are_not_downloaded(server, tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    download(server.url, tmp_path / "a.tar", SUM)
    (tmp_path / "b.tar.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "b.tar", SUM)
    assert server.starts == []


def test_a_file_with_a_wrong_checksum_is_removed(server, tmp_path):
    with pytest.raises(DataError, match=f"MD5 is {SUM}"):
        download(server.url, tmp_path / "a.tar", "0" * 32)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_unreachable_server(tmp_path):
    with pytest.raises(DataError, match="broke off after 0 bytes"):
        download("http://127.0.0.1:9/a.tar", tmp_path / "a.tar", SUM, attempts=2)


def archive(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_extract_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.tgz"
    path.write_bytes(archive(**{"top/a": b"1", "top/b": b"2"}))
    assert (extract(path, tmp_path, "top") / "b").read_bytes() == b"2"
    for content in (archive(**{"other/a": b"1"}), archive(**{"../evil": b"1"}), path.read_bytes()[:60], b"x"):
        path.write_bytes(content)
        with pytest.raises(DataError):
            extract(path, tmp_path / "into", "top2")
        assert not (tmp_path / "evil").exists()
        assert not list((tmp_path / "into").glob("*"))


def test_missing_cifar_is_downloaded(server, synthetic, tmp_path, monkeypatch):
    folder = synthetic / "cifar-100-python"
    server.content = archive(**{f"cifar-100-python/{n}": (folder / n).read_bytes() for n in ("train", "test", "meta")})
    server.limit = len(server.content) // 3
    published = Archive(server.url, hashlib.md5(server.content).hexdigest(), "cifar-100-python")
    monkeypatch.setattr(CIFAR100DataModule, "archives", (published,))
    data = CIFAR100DataModule(str(tmp_path / "data"), download=True, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    assert len(data.datasets["train"]) > 0
    asked = len(server.starts)
    data.prepare_data()
    assert len(server.starts) == asked
