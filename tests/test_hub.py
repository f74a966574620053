"""Names, downloads from a small hub on this machine, and imports of folders downloaded by hand."""

import hashlib
import json
import re
import shutil
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava import hub
from llava.errors import CheckpointError, DownloadError

COMMIT = "c" * 40
REPO = "owner/tiny"


def safetensors_bytes(**tensors: bytes) -> bytes:
    header, start = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, start + len(data)]}
        start += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


WEIGHTS = safetensors_bytes(a=bytes(range(256)) * 16_000, b=b"b" * 50)  # 4 MB: several blocks


class Hub:
    """A hub of one repository that can misbehave: break connections, send wrong bytes, refuse."""

    def __init__(self) -> None:
        self.files = {"config.json": b'{"model_type": "llava_qwen"}', "model.safetensors": WEIGHTS}
        self.sent_instead: dict[str, bytes] = {}
        self.break_after: list[int] = []
        """Bytes after which the next large transfers are cut, one entry a transfer."""
        self.refusal: tuple[int, str] | None = None
        self.knows_ranges = True
        self.ranges: list[str | None] = []
        """`Range` of each GET of the weights."""
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = ""

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {
            "size": len(data),
            "git": git,
            "lfs": lfs if name.endswith((".safetensors", ".bin")) else None,
        }

    def answer(self, path: str) -> Any:
        if path.startswith(f"/api/models/{REPO}/tree/"):
            listing = []
            for name in self.files:
                entry = self.entry(name)
                item = {"type": "file", "path": name, "size": entry["size"], "oid": entry["git"]}
                if lfs := entry["lfs"]:
                    item["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}
                listing.append(item)
            return listing
        entries = {name: self.entry(name) for name in self.files}
        siblings = [
            {
                "rfilename": name,
                "size": e["size"],
                "blobId": e["git"],
                **({"lfs": e["lfs"]} if e["lfs"] else {}),
            }
            for name, e in entries.items()
        ]
        return {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if REPO in self.path:
            self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.refusal:
            status, code = self.hub.refusal
            return self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        if self.path.startswith("/api/"):
            body = json.dumps(self.hub.answer(self.path)).encode()
            return self.reply(200, body, {"Content-Type": "application/json"})
        name = self.path.rsplit("/", 1)[-1]
        entry = self.hub.entry(name)
        etag = entry["lfs"]["sha256"] if entry["lfs"] else entry["git"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        body = self.hub.sent_instead.get(name, self.hub.files[name])
        status = 200
        if self.command == "GET":
            self.hub.fetched.append(name)
            wanted = self.headers.get("Range")
            if entry["lfs"]:
                self.hub.ranges.append(wanted)
            if wanted and self.hub.knows_ranges:
                start = int(re.findall(r"\d+", wanted)[0])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body, status = body[start:], 206
        cut = (
            self.hub.break_after.pop(0)
            if self.command == "GET" and entry["lfs"] and self.hub.break_after
            else None
        )
        self.reply(status, body, headers, cut)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.fetch, "RETRY_WAITS", (0.0, 0.0))
    state = Hub()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture
def fetch(server: Hub, tmp_path: Path) -> Any:
    return lambda **options: hub.download(REPO, cache_dir=tmp_path / "hf", endpoint=server.url, **options)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither the imports nor the hub cache of the person who runs the tests."""
    from huggingface_hub import constants

    monkeypatch.setenv("LLAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "home"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint in two shards, as a browser might have left it."""
    folder = tmp_path / "CCExpert_0.5b"
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {"a": b"1234"},
        "model-00002-of-00002.safetensors": {"b": b"567"},
    }
    for name, tensors in shards.items():
        (folder / name).write_bytes(safetensors_bytes(**tensors))
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llava_qwen_cc"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


# --- downloads ---


def test_a_download_holds_the_files_of_the_hub_and_no_pickle(server: Hub, fetch: Any) -> None:
    server.files |= {"pytorch_model.bin": b"pickle", "notes.md": b"-", "merges.txt": b"m"}
    folder = fetch()
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "merges.txt"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloaded(REPO) == folder


def test_a_second_download_fetches_nothing(server: Hub, fetch: Any) -> None:
    first = fetch()
    server.fetched.clear()
    assert fetch() == first
    assert server.fetched == []


def test_a_broken_connection_is_resumed_where_it_broke(server: Hub, fetch: Any) -> None:
    server.break_after = [1_500_000, 700_000]
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    starts = [int(r[6:-1]) for r in server.ranges if r]
    assert server.ranges[0] is None and len(starts) == 2
    assert 0 < starts[0] <= 1_500_000 and starts[0] < starts[1] <= 2_200_000


def test_what_a_failed_run_received_is_used_by_the_next(server: Hub, fetch: Any) -> None:
    server.break_after = [2_000_000, 0, 0, 0]
    with pytest.raises(DownloadError, match="what has arrived is kept"):
        fetch()
    server.ranges.clear()
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert server.ranges[0] and int(server.ranges[0][6:-1]) >= 1_000_000


def test_a_server_without_ranges_sends_the_file_anew(server: Hub, fetch: Any) -> None:
    server.knows_ranges = False
    server.break_after = [2_000_000]
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_wrong_checksum_is_refused_and_the_file_removed(server: Hub, fetch: Any, tmp_path: Path) -> None:
    server.sent_instead["model.safetensors"] = WEIGHTS[:-1] + b"?"
    with pytest.raises(DownloadError, match=r"model\.safetensors arrived damaged"):
        fetch()
    assert not [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.stat().st_size >= len(WEIGHTS)]
    assert hub.downloaded(REPO) is None
    server.sent_instead.clear()
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_cached_file_that_rotted_is_found(fetch: Any, name: str) -> None:
    path = fetch() / name
    data = path.read_bytes()
    path.resolve().write_bytes(data[:-1] + b"!")
    with pytest.raises(DownloadError, match=rf"{re.escape(name)} arrived damaged"):
        fetch()
    assert (fetch() / name).read_bytes() == data


def test_a_repository_of_pickles_alone_is_refused(server: Hub, fetch: Any) -> None:
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(DownloadError, match="no safetensors"):
        fetch()
    assert server.fetched == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "no repository owner/tiny"),
        (404, "RevisionNotFound", "no revision 'v9'"),
        (403, "GatedRepo", "is gated"),
        (500, "", "answered 500"),
    ],
)
def test_refusals_are_one_plain_line(server: Hub, fetch: Any, status: int, code: str, words: str) -> None:
    server.refusal = status, code
    with pytest.raises(DownloadError, match=words) as error:
        fetch(revision="v9")
    assert "\n" not in str(error.value)


def test_no_network_is_said_in_one_line(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"no connection to http://127\.0\.0\.1:9") as error:
        hub.download(REPO, cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(error.value)


def test_offline_gives_the_cached_copy_or_says_so(fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        fetch()


def test_a_full_disk_is_found_before_the_first_byte(
    server: Hub, fetch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DownloadError, match=r"disk full: 0\.00 GB are needed"):
        fetch()
    assert server.fetched == []


def test_a_release_on_a_net_disk_says_how_to_get_it() -> None:
    with pytest.raises(DownloadError, match="llava import FOLDER --name ccexpert-7b"):
        hub.download("ccexpert-7b")


# --- names ---


def test_every_release_is_complete() -> None:
    for name, release in hub.RELEASES.items():
        assert name == release.name == name.lower()
        assert release.repo is None or re.fullmatch(r"[\w.-]+/[\w.-]+", release.repo)
        assert release.licence and release.size_gb > 0 and release.note
        if scores := release.scores:
            mean = (scores.bleu4 + scores.meteor + scores.rouge_l + scores.cider_d) / 4
            assert scores.sm == pytest.approx(mean, abs=0.05) and scores.source


def test_a_name_becomes_a_hub_id_until_its_weights_are_here(
    fetch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = hub.Release("tiny", "base", REPO, "MIT", 0.1, "for the test")
    monkeypatch.setitem(hub.RELEASES, "tiny", release)
    assert hub.resolve("tiny") == hub.resolve("TINY") == REPO
    folder = fetch()
    assert hub.resolve("tiny") == str(folder)
    (folder / "model.safetensors").unlink()
    assert hub.resolve("tiny") == REPO


def test_paths_and_hub_ids_stand_for_themselves(tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == str(tmp_path)
    assert hub.resolve("owner/other-model") == "owner/other-model"


@pytest.mark.parametrize(
    "path", ["./absent", "../absent", "a/b/c", "/absent", "~/absent-folder", "runs/", r"C:\x"]
)
def test_a_path_that_is_not_there_is_no_hub_id(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="no folder"):
        hub.resolve(path)


def test_an_unknown_name_lists_the_known_and_the_near() -> None:
    with pytest.raises(DownloadError, match=r"did you mean ccexpert-0\.5b.*known: .*siglip-so400m-384"):
        hub.resolve("ccexpert-0.5")


def test_an_imported_model_wins_over_its_hub_id(checkpoint: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be fetched by name"):
        hub.resolve("ccexpert-0.5b")
    target = hub.import_checkpoint(checkpoint)
    assert hub.resolve("ccexpert-0.5b") == str(target)


# --- imports ---


@pytest.mark.parametrize("link", [False, True])
def test_an_import_has_the_same_bytes_and_leaves_no_trace(
    checkpoint: Path, own_home: Path, link: bool
) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"pickle")
    before = sorted(p.name for p in checkpoint.iterdir())
    target = hub.import_checkpoint(checkpoint, "mine", link=link)
    assert target == own_home / "models" / "mine"
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        p.name: p.read_bytes() for p in checkpoint.iterdir() if p.name != "optimizer.pt"
    }
    assert (target / "config.json").is_symlink() == link
    assert [p.name for p in target.parent.iterdir()] == ["mine"]
    assert sorted(p.name for p in checkpoint.iterdir()) == before


def test_a_name_is_taken_once_unless_replaced(checkpoint: Path) -> None:
    hub.import_checkpoint(checkpoint, "mine")
    (checkpoint / "config.json").write_text('{"model_type": "change_vlm"}')
    with pytest.raises(CheckpointError, match="already imported"):
        hub.import_checkpoint(checkpoint, "mine")
    target = hub.import_checkpoint(checkpoint, "mine", replace=True)
    assert "change_vlm" in (target / "config.json").read_text()
    with pytest.raises(CheckpointError, match="itself"):
        hub.import_checkpoint(target, "mine", replace=True, link=True)


def test_an_interrupted_import_is_not_a_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub.importing, "_place", stop)
        hub.import_checkpoint(checkpoint, "mine")
    assert hub.imported() == {}
    assert list(hub.imported(hub.import_checkpoint(checkpoint, "mine").parent.parent)) == ["mine"]


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


FAULTS = {
    "no config": (remove("config.json"), "has no config.json"),
    "broken config": (write("config.json", b"{"), "config.json cannot be read as JSON"),
    "config is a list": (write("config.json", b"[]"), "does not hold a JSON object"),
    "another model": (
        write("config.json", b'{"model_type": "bert"}'),
        "model_type 'bert' is none of change_vlm",
    ),
    "shard missing": (
        remove("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors is missing",
    ),
    "index missing": (remove("model.safetensors.index.json"), "model.safetensors.index.json is missing"),
    "no tokenizer": (remove("tokenizer.json"), "vocab.json with merges.txt, is missing"),
    "no tokenizer config": (remove("tokenizer_config.json"), "tokenizer_config.json is missing"),
    "unfinished": (write("model-3.baiduyun.p.downloading", b""), "is an unfinished download"),
    "lfs pointer": (
        write(
            "model-00001-of-00002.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
        ),
        "a git-lfs pointer",
    ),
    "web page": (write("model-00001-of-00002.safetensors", b"<!DOCTYPE html><html>..</html>"), "a web page"),
    "empty shard": (write("model-00001-of-00002.safetensors", b""), "cut off at 0 bytes"),
    "tensor absent": (
        write("model-00001-of-00002.safetensors", safetensors_bytes(c=b"1")),
        "1 tensors of model.safetensors.index.json are in no shard, first a",
    ),
    "escaping index": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "../secret.safetensors"}}'),
        "not a plain file name",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_nothing_is_taken_in(checkpoint: Path, fault: str) -> None:
    harm, words = FAULTS[fault]
    harm(checkpoint)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        hub.import_checkpoint(checkpoint, "mine")
    assert hub.imported() == {}


def test_all_faults_are_said_at_once(checkpoint: Path) -> None:
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)model-00001.* is missing.*no tokenizer"):
        hub.inspect_checkpoint(checkpoint)


def test_a_folder_too_far_out_is_pointed_inwards(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean .*CCExpert_0\.5b"):
        hub.inspect_checkpoint(checkpoint.parent)


def test_published_configs_of_a_general_type_are_known_by_their_architecture(checkpoint: Path) -> None:
    config = {"model_type": "qwen2", "architectures": ["LlavaQwenForCausalLM"]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert hub.inspect_checkpoint(checkpoint).keys == {"a", "b"}


def test_pickled_weights_are_taken_when_whole(checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    for path in checkpoint.glob("model*"):
        path.unlink()
    torch.save({"a": torch.zeros(2)}, checkpoint / "pytorch_model.bin")
    assert hub.inspect_checkpoint(checkpoint).pickled
    data = (checkpoint / "pytorch_model.bin").read_bytes()
    (checkpoint / "pytorch_model.bin").write_bytes(data[:-30])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is cut off"):
        hub.inspect_checkpoint(checkpoint)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, len(safetensors_bytes(a=b"1234")) - 1))
def test_a_shard_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "config.json").write_text('{"model_type": "llava_qwen"}')
    (folder / "model.safetensors").write_bytes(safetensors_bytes(a=b"1234")[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*download it again"):
        hub.inspect_checkpoint(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80))
def test_foreign_bytes_give_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        hub.inspect_checkpoint(folder)
