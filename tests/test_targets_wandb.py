"""`wandb:` targets through the real wandb client, against a server on this machine that knows one run's files."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import N_VOCAB, tiny_tokenizer, tiny_tokens

from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.errors import SettingError
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.load import load_target, target_shape
from nndecomp.targets.wandb_runs import cache_directory

CONFIG = LlamaSimpleMLPConfig(n_layers=2, d_model=32, d_mlp=48, n_heads=4, n_kv_heads=2, n_ctx=16, n_vocab=N_VOCAB)
PATH = "wandb:goodfire/spd/t-32d1bb3b"


class Server:
    """Answers the two queries with which wandb 0.31 lists the files of run t-32d1bb3b, and serves them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.downloads: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None: ...

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                name = self.path.removeprefix("/file/")
                server.downloads.append(name)
                self.answer(server.files[name])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                self.answer(json.dumps({"data": server.reply(body.get("variables") or {})}).encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reply(self, variables: dict) -> dict:
        nodes = [
            {
                "id": name,
                "name": name,
                "url": f"{self.url}/file/{name}",
                "directUrl": f"{self.url}/file/{name}",
                "sizeBytes": len(body),
                "mimetype": "",
                "updatedAt": None,
                "md5": "",
            }
            for name, body in self.files.items()
        ]
        run = {
            "projectId": "1",
            "id": "UnVuOjE=",
            "name": "t-32d1bb3b",
            "displayName": "t-32d1bb3b",
            "state": "finished",
            "config": "{}",
            "summaryMetrics": "{}",
            "systemMetrics": "{}",
            "tags": [],
            "historyKeys": None,
            "user": {"name": "u", "username": "u"},
            "fileCount": len(nodes),
            "files": {
                "edges": [{"node": node, "cursor": node["name"]} for node in nodes],
                "pageInfo": {"endCursor": None, "hasNextPage": False},
            },
        }
        found = variables.get("name") in (None, "t-32d1bb3b")
        return {
            "viewer": {"id": "1", "entity": "goodfire", "username": "u", "teams": {"edges": []}, "flags": "{}"},
            "serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "99.0.0"}},
            "project": {"internalId": "1", "run": run if found else None},
        }


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    for name, value in {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "a" * 40,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "WANDB_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.http.shutdown()
    server.http.server_close()


def run_files(directory: Path) -> tuple[dict[str, bytes], LlamaSimpleMLP]:
    model = LlamaSimpleMLP(CONFIG, torch.Generator().manual_seed(0))
    directory.mkdir()
    torch.save(LlamaSimpleMLP(CONFIG, torch.Generator().manual_seed(1)).state_dict(), directory / "model_step_500.pt")
    torch.save(model.state_dict(), directory / "model_step_1000.pt")
    (directory / "model_config.yaml").write_text(yaml.safe_dump(CONFIG.published()))
    (directory / "final_config.yaml").write_text("steps: 1000\n")
    (directory / "output.log").write_text("not wanted\n")
    tiny_tokenizer().backend_tokenizer.save(str(directory / "tokenizer.json"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}, model


def test_a_run_is_fetched_once_and_its_last_weights_are_loaded(server: Server, tmp_path: Path) -> None:
    server.files, model = run_files(tmp_path / "run")
    cfg = TargetConfig(kind=TargetKind.llama_simple_mlp, path=PATH)
    shape = target_shape(cfg)
    assert sorted(server.downloads) == ["final_config.yaml", "model_config.yaml", "tokenizer.json"], "no weights yet"
    target = load_target(cfg, torch.device("cpu"))
    assert target.name == "t-32d1bb3b" and target.shape == shape
    assert torch.equal(target.logits(tiny_tokens()), model(tiny_tokens()))
    assert target.tokenizer.encode("w1") == [2]
    assert server.downloads.count("model_step_1000.pt") == 1
    assert not {"model_step_500.pt", "output.log"} & set(server.downloads)
    cached = {file.name: file.read_bytes() for file in cache_directory(PATH).iterdir()}
    assert cached == {name: server.files[name] for name in cached}

    before = len(server.downloads)
    load_target(cfg, torch.device("cpu"))
    assert len(server.downloads) == before


def test_a_run_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(SettingError, match="target.path=wandb:goodfire/spd/missing"):
        target_shape(TargetConfig(kind=TargetKind.llama_simple_mlp, path="wandb:goodfire/spd/missing"))


def test_a_run_without_a_model_is_named(server: Server) -> None:
    server.files = {"output.log": b"hello"}
    with pytest.raises(SettingError, match="without model_config.yaml and model_step"):
        target_shape(TargetConfig(kind=TargetKind.llama_simple_mlp, path=PATH))


@pytest.mark.parametrize("path", ["wandb:", "wandb:spd/t-1", "wandb:a/b/c/d", "wandb:a//c", "wandb:../../x"])
def test_a_malformed_run_is_refused_before_the_network_is_asked(path: str) -> None:
    with pytest.raises(SettingError, match="wandb:<entity>/<project>/<run>"):
        cache_directory(path)


def test_the_page_address_of_a_run_names_the_same_run() -> None:
    assert cache_directory("wandb:goodfire/spd/runs/t-1") == cache_directory("wandb:goodfire/spd/t-1")
