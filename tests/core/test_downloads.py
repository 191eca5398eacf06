"""What is fetched is whole, has the digest of its name and is a checkpoint, or it is not kept."""

import functools
import hashlib
import http.server
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ikl_plugins import checkpoints
from ikl_plugins.checkpoints import fetch, load_weights

pytestmark = pytest.mark.skipif(not checkpoints.READS_WEIGHTS_ONLY, reason="needs torch 2.6 or newer")
SOUND = io.BytesIO()
torch.save({"weight": torch.arange(1000.0)}, SOUND)
SOUND = SOUND.getvalue()
DIGEST = hashlib.sha256(SOUND).hexdigest()
PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>"
# what is sent under each name: the content, its declared length (None for none)
FILES = {
    "sound.pth": (SOUND, len(SOUND)),
    f"sound-{DIGEST[:8]}.pth": (SOUND, len(SOUND)),
    "of_no_length.pth": (SOUND, None),
    "cut.pth": (SOUND[:2000], len(SOUND)),
    "cut_of_no_length.pth": (SOUND[:2000], None),
    f"cut-{DIGEST[:10]}.pth": (SOUND[:2000], None),
    "page.pth": (PAGE, len(PAGE)),
    f"page-{DIGEST[:8]}.pth": (PAGE, None),
    "other-0123abcd.pth": (SOUND, None),
    "large.pth": (bytes(3 * 2**20), None),
    "declared.pth": (SOUND, 2**40),
    "code.pth": (b"cos\nsystem\n(S'true'\ntR.", None),
}
REFUSED = {
    "cut.pth": r"cannot be fetched: it ended after 2,000 of [\d,]+ bytes\. ",
    "cut_of_no_length.pth": r"must be one of torch\.save, but reading it gave: .*\. It is not kept",
    f"cut-{DIGEST[:10]}.pth": rf"must have the SHA-256 in its name, {DIGEST[:10]}, but has [0-9a-f]{{10}}\. It is not",
    "page.pth": r"must be one of torch\.save, but it is a web page\. .*It is not kept",
    f"page-{DIGEST[:8]}.pth": r"must have the SHA-256 in its name, .*, but is a web page\. It is not kept",
    "other-0123abcd.pth": rf"must have the SHA-256 in its name, 0123abcd, but has {DIGEST[:8]}\. It is not kept",
    "large.pth": r"must unpack to at most 2,000,000 bytes, got .*Set IKL_PLUGINS_MAX_CHECKPOINT_BYTES",
    "declared.pth": r"cannot be fetched: it ended after .* of 1,099,511,627,776 bytes",
    "code.pth": r"would run code",
    "missing.pth": r"cannot be fetched: HTTP Error 404",
}


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        content, length = FILES.get(self.path[1:], (b"", None))
        self.send_response(200 if content else 404)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An address, what has been asked for there, and the folder that keeps what is fetched."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.asked = []
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", server.asked, tmp_path / "hub" / "checkpoints"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["sound.pth", f"sound-{DIGEST[:8]}.pth", "of_no_length.pth"])
def test_what_is_whole_is_fetched_once_and_kept(name, served):
    address, asked, hub = served
    for _ in range(2):
        assert torch.equal(load_weights(f"{address}/{name}")["weight"], torch.arange(1000.0))
    assert asked == [f"/{name}"]
    (kept,) = hub.iterdir()
    assert kept.read_bytes() == SOUND


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_is_refused_and_not_kept(name, served, monkeypatch):
    address, _, hub = served
    monkeypatch.setenv("IKL_PLUGINS_MAX_CHECKPOINT_BYTES", "2000000")
    for read in (load_weights, fetch):
        with pytest.raises(ValueError, match=rf"{address}/{name}.*{REFUSED[name]}") as refused:
            read(f"{address}/{name}")
        assert str(refused.value).isprintable()
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (f"sound-{DIGEST[:8]}.pth", SOUND[:2000], "must have the SHA-256 in its name"),
        (f"sound-{DIGEST[:8]}.pth", PAGE, "must have the SHA-256 in its name, .*is a web page"),
        ("sound.pth", SOUND[:2000], r"must be one of torch\.save, but"),
        ("sound.pth", PAGE, "it is a web page"),
        ("sound.pth", None, "cannot be kept|must be one of"),
    ],
)
def test_a_bad_file_that_is_kept_is_refused_with_its_path(name, content, what, served):
    address, asked, hub = served
    hub.mkdir(parents=True)
    if content is None:
        (hub / name).mkdir()
    else:
        (hub / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{address}/{name}.*({what}).*{hub}/{name}"):
        fetch(f"{address}/{name}")
    assert asked == []


@pytest.mark.parametrize(
    "address", ["http://", "http://[", "http://a/..", "ftp://a/b.pth", "file:///etc/passwd", "http://\u2100/c.pth"]
)
def test_what_is_no_address_of_a_file_is_refused(address):
    with pytest.raises(ValueError, match=r"an address must be http\(s\) and end with a name, got .*Name a file\."):
        fetch(address)


@pytest.mark.parametrize("address", ["http://a b/c.pth", "http://a:b/c.pth", "http://127.0.0.1:9/c.pth"])
def test_an_address_that_leads_nowhere_is_refused(address, served):
    with pytest.raises(ValueError, match=r"cannot be fetched: .*Check the address, or name a file\.$"):
        fetch(address)


def test_two_processes_that_fetch_at_once_read_one_whole_file(served, monkeypatch):
    address, _, hub = served
    code = f"import sys, torch; torch.hub.set_dir({str(hub.parent)!r})\n"
    code += "from ikl_plugins.checkpoints import load_weights; print('ready', flush=True); sys.stdin.readline()\n"
    code += f"print(load_weights('{address}/sound.pth')['weight'].sum().item())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.communicate(timeout=60)[0] for one in both] == ["499500.0\n"] * 2
    (kept,) = hub.iterdir()
    assert Path(kept).read_bytes() == SOUND
