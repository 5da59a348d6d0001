"""Downloads by name, against a local server that speaks the hub's headers."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save

from dinotrain.backbones import hub, load_backbone, weights
from dinotrain.backbones.layouts import to_layout
from dinotrain.backbones.vit import VARIANTS, VisionTransformer, ViTConfig
from dinotrain.errors import DownloadError, ShapeError, UsageError, WeightsError

NAME = "dinov2_vits14"
COMMIT = "a" * 40

TINY = ViTConfig(
    name=NAME, embed_dim=64, depth=2, heads=1, ffn_dim=128, grid=(4, 4), position_rule="scale"
)


def tiny_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = VisionTransformer(TINY).state_dict()
    return {key: torch.randn(value.shape, generator=generator) for key, value in shapes.items()}


class Hub:
    """One repository with one file, and what was asked of it."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag = hashlib.sha256(content).hexdigest()
        self.requests: list[tuple[str, str, str | None]] = []
        self.break_after: int | None = None
        self.status = 200
        hub_state = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub_state.answer(self, body=False)

            def do_GET(self) -> None:
                hub_state.answer(self, body=True)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        asked = request.headers.get("Range")
        self.requests.append((request.command, request.path, asked))
        if self.status != 200:
            request.send_response(self.status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        part = self.content[start:]
        request.send_response(206 if asked else 200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{self.etag}"')
        request.send_header("Content-Length", str(len(part)))
        if asked:
            last = len(self.content) - 1
            request.send_header("Content-Range", f"bytes {start}-{last}/{len(self.content)}")
        request.end_headers()
        if not body:
            return
        if self.break_after is not None and not asked:
            request.wfile.write(part[: self.break_after])
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        request.wfile.write(part)

    def count(self, method: str) -> int:
        # Newer libraries also ask the hub for lists of their own.
        return sum(
            command == method and path.endswith(hub.FILE) for command, path, _ in self.requests
        )

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    content = save(to_layout(tiny_state(), "hf", TINY), metadata={"format": "pt"})
    running = Hub(content)
    yield running
    running.stop()


def fetch(server: Hub, cache: Path, source: str = NAME) -> Path:
    return hub.fetch(source, cache_dir=cache, endpoint=server.endpoint)


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def leftovers(cache: Path) -> list[Path]:
    return [
        path
        for path in cache.rglob("*")
        if (path.is_file() or path.is_symlink())
        and (path.name == hub.FILE or path.parent.name == "blobs")
    ]


def test_every_variant_has_its_repository():
    assert hub.REPOSITORIES.keys() == VARIANTS.keys()
    assert hub.REPOSITORIES[NAME] == "facebook/dinov2-small"
    assert hub.REPOSITORIES["dinov2_vitg14_reg"] == "facebook/dinov2-with-registers-giant"


def test_second_call_needs_no_network(server, tmp_path):
    first = fetch(server, tmp_path)
    asked = len(server.requests)
    server.stop()

    assert fetch(server, tmp_path) == first
    assert first.read_bytes() == server.content
    assert len(server.requests) == asked
    assert server.count("GET") == 1
    assert server.requests[0][1] == "/facebook/dinov2-small/resolve/main/model.safetensors"


def test_dropped_connection_resumes_where_it_broke(server, tmp_path, monkeypatch):
    # The library keeps whole chunks only, by default of 10 MB: more than this file has.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    server.break_after = 1000

    path = fetch(server, tmp_path)

    assert path.read_bytes() == server.content
    ranges = [asked for command, _, asked in server.requests if command == "GET"]
    assert ranges[0] is None
    assert ranges[1] == "bytes=1000-"


def test_wrong_digest_is_refused_and_deleted(server, tmp_path):
    real, server.etag = server.etag, "b" * 64

    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path)

    one_line(error, real, "b" * 64, "was deleted", "repeat the command")
    assert leftovers(tmp_path) == []

    server.etag = real
    assert fetch(server, tmp_path).read_bytes() == server.content


def test_file_without_a_declared_digest_is_refused(server, tmp_path):
    server.etag = "c" * 40

    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path)
    one_line(error, "declares no sha256 but 'cccc", "--backbone FILE")
    assert server.count("GET") == 0


def test_digest_is_computed_once(server, tmp_path, monkeypatch):
    computed = []
    real = hub.sha256_of
    monkeypatch.setattr(hub, "sha256_of", lambda path: computed.append(path) or real(path))

    path = fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert len(computed) == 1

    os.utime(path, ns=(1, 1))
    fetch(server, tmp_path)
    assert len(computed) == 2


@pytest.mark.parametrize("same_size", [True, False])
def test_file_changed_in_the_cache_is_refused(server, tmp_path, same_size):
    path = fetch(server, tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content if same_size else content[:-1])

    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path)

    one_line(error, server.etag, "was deleted")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("sidecar", [b"", b"[]", b'{"sha256": 3}'])
def test_damaged_sidecar_only_costs_a_digest(server, tmp_path, sidecar):
    path = fetch(server, tmp_path)
    hub._sidecar(path).write_bytes(sidecar)

    assert fetch(server, tmp_path) == path
    assert msgspec.json.decode(hub._sidecar(path).read_bytes())["sha256"] == server.etag


def test_cache_without_links_is_verified_against_the_sidecar(server, tmp_path):
    path = fetch(server, tmp_path)
    blob = path.resolve()
    path.unlink()
    blob.rename(path)
    server.stop()

    assert fetch(server, tmp_path) == path


def test_pin(server, tmp_path):
    wrong = "d" * 64

    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path, f"{NAME}@sha256:{wrong}")
    one_line(error, wrong, server.etag, "Change the pin")
    assert server.count("GET") == 0

    path = fetch(server, tmp_path, f"{NAME}@sha256:{server.etag.upper()}")
    with pytest.raises(DownloadError):
        fetch(server, tmp_path, f"{NAME}@sha256:{wrong}")
    # The file is what the hub declares; only this pin disagrees.
    assert path.is_file()


@pytest.mark.parametrize("pin", ["", "sha256:", "sha256:12", "md5:" + "a" * 64, "a" * 64])
def test_pins_that_are_none(server, tmp_path, pin):
    with pytest.raises(UsageError, match=r"pins no digest\. Write dinov2_vits14@sha256:"):
        fetch(server, tmp_path, f"{NAME}@{pin}")


def test_unknown_name(server, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'dinov2_vitl14'"):
        fetch(server, tmp_path, "dinov2_vitl")


def test_server_absent(server, tmp_path):
    server.stop()

    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path)
    one_line(
        error, "facebook/dinov2-small/model.safetensors", "could not be downloaded", "--backbone"
    )


@pytest.mark.parametrize("status", [401, 404, 500])
def test_server_refuses(server, tmp_path, status):
    server.status = status

    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path)
    one_line(error, "could not be downloaded", "--backbone FILE")


def test_download_that_breaks_off_for_good(server, tmp_path, monkeypatch):
    def broken(*args: object, **kwargs: object) -> str:
        raise OSError("Consistency check failed: file should be of size 9\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)

    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path)
    one_line(error, "Consistency check failed")


def command(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


FETCH = """
import sys
from dinotrain.backbones import hub
from dinotrain.errors import DownloadError
try:
    hub.fetch("dinov2_vits14")
except DownloadError as error:
    sys.exit(f"DownloadError: {error}")
"""


def test_environment_and_silence(server, tmp_path):
    """``HF_ENDPOINT`` and ``HF_HOME`` are honoured, and nothing is printed off a terminal."""
    online = command(FETCH, HF_ENDPOINT=server.endpoint, HF_HOME=str(tmp_path / "a"))
    offline = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "1"}
    cached = command(FETCH, HF_HOME=str(tmp_path / "a"), **offline)
    empty = command(FETCH, HF_HOME=str(tmp_path / "b"), **offline)

    assert (online.returncode, online.stdout, online.stderr) == (0, "", "")
    assert (cached.returncode, cached.stderr) == (0, "")
    assert empty.returncode == 1
    assert empty.stderr.count("\n") == 1
    assert empty.stderr.startswith("DownloadError: facebook/dinov2-small/model.safetensors")
    assert "HF_HUB_OFFLINE" in empty.stderr
    assert server.count("GET") == 1


# Through load_backbone


@pytest.fixture
def by_name(server, tmp_path, monkeypatch):
    """``load_backbone(NAME)`` over the local server, with a tiny architecture under the name."""
    monkeypatch.setitem(VARIANTS, NAME, TINY)
    monkeypatch.chdir(tmp_path)
    real = hub.fetch
    monkeypatch.setattr(
        hub,
        "fetch",
        lambda source: real(source, cache_dir=tmp_path / "cache", endpoint=server.endpoint),
    )
    return server


def test_named_backbone_has_the_hub_rule(by_name):
    model = load_backbone(f"{NAME}@sha256:{by_name.etag}", image_size=224)

    # The file is in transformers' layout, whose own rule would be "size".
    assert model.config == TINY
    assert all(torch.equal(value, tiny_state()[key]) for key, value in model.state_dict().items())
    assert load_backbone(NAME, position_rule="size").config.position_rule == "size"


def test_named_backbone_must_be_what_its_name_says(by_name, monkeypatch):
    monkeypatch.setitem(VARIANTS, NAME, msgspec.structs.replace(TINY, depth=3))

    with pytest.raises(WeightsError) as error:
        load_backbone(NAME)
    one_line(error, "holds vit_d64_l2, not dinov2_vits14")


def test_wrong_image_size_costs_no_download(by_name):
    with pytest.raises(ShapeError):
        load_backbone(NAME, image_size=230)
    assert by_name.requests == []


def test_path_that_exists_wins_over_a_name(by_name, tmp_path):
    weights.save_backbone(VisionTransformer(TINY), tmp_path / NAME)

    assert not load_backbone(NAME).cls_token.any()
    assert by_name.requests == []
