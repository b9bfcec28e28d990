"""The hub's files, from a small server that answers as the hub does, and where there is none that answers."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from cases import each
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

import patchssl
from patchssl.models import hub
from patchssl.runtime.errors import CheckpointError, UsageError

REPO = "org/net"
COMMIT = "1234567890abcdef1234567890abcdef12345678"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
REFUSALS = {  # of a question for a file: status and headers as the hub sends them
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/net is restricted"}),
    "gone": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "unknown": (401, {"X-Error-Message": "Invalid username or password."}),
    "revision": (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: v9"}),
    "forbidden": (403, {"X-Error-Message": "No access from here"}),
    "nowhere": (404, {}),
    "down": (503, {}),
}


class Hub:
    """What the server has, how it behaves, and what it was asked."""

    def __init__(self):
        self.files, self.questions, self.uploaded = {}, [], {}
        self.refusal = self.later = None  # keys of REFUSALS: from now on, and after the next question
        self.commit = COMMIT  # None for a page that is not the hub's
        self.redirected = set()  # files that lie on another host
        self.cut = False  # the first download breaks off halfway, those after it fail
        self.upload_status, self.exists = 200, False
        self.private = None  # until there is a repository
        self.downloads = 0

    @property
    def heads(self):
        return [path for method, path, _ in self.questions if method == "HEAD"]


def handler(state):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, content=b"", **headers):
            if isinstance(content, dict):
                content = json.dumps(content).encode()
            self.send_response(status)
            headers = {"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_HEAD(self):
            path = unquote(urlsplit(self.path).path)
            state.questions.append((self.command, path, dict(self.headers)))
            if path.startswith("/api/"):
                return self.answer_api(path)
            if state.refusal:
                status, headers = REFUSALS[state.refusal]
                return self.answer(status, b"", **headers)
            name = path.split("/resolve/")[-1].split("/", 1)[-1].removeprefix("stored/")
            if name not in state.files:
                return self.answer(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": state.commit})
            content, state.refusal = state.files[name], state.later
            facts = {"ETag": f'"{name}-{len(content)}"'} | ({"X-Repo-Commit": state.commit} if state.commit else {})
            if name in state.redirected and "/resolve/" in path:
                port = self.server.server_address[1]
                facts |= {"X-Linked-ETag": facts["ETag"], "X-Linked-Size": str(len(content)),
                          "Location": f"http://localhost:{port}/stored/{name}"}
                return self.answer(302, b"elsewhere", **facts)
            if self.command == "GET" and state.cut:
                return self.break_off(content)
            return self.answer(200, content, **facts)

        do_GET = do_HEAD  # noqa: N815

        def break_off(self, content):
            state.downloads += 1
            if state.downloads > 1:
                return self.answer(500)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True

        def answer_api(self, path):
            if path == "/api/whoami-v2":
                known = self.headers.get("authorization") == "Bearer hf_right"
                return self.answer(200 if known else 401, {"name": "org", "type": "user"} if known else {})
            if path == f"/api/models/{REPO}":
                if state.private is None:
                    return self.answer(404, {}, **{"X-Error-Code": "RepoNotFound"})
                return self.answer(200, {"id": REPO, "private": state.private, "sha": COMMIT, "siblings": []})
            return self.answer(404)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = unquote(urlsplit(self.path).path)
            state.questions.append((self.command, path, dict(self.headers)))
            address = f"{constants.ENDPOINT}/{REPO}"
            if path == "/api/repos/create":
                asked = json.loads(body)
                if not state.exists and state.upload_status == 200:
                    state.private = bool(asked.get("private")) or asked.get("visibility") == "private"
                return self.answer(409 if state.exists else state.upload_status, {"url": address})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == f"/api/models/{REPO}/preupload/main":
                names = [file["path"] for file in json.loads(body)["files"]]
                return self.answer(200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False}
                                                   for name in names]})
            if path == f"/api/models/{REPO}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    else:
                        state.message = line["value"]["summary"]
                return self.answer(200, {"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT})
            return self.answer(404)

    return Handler


def forget_connections():
    """huggingface_hub keeps its connections, and what it knew of proxies when it made them."""
    (getattr(_http, "close_session", None) or _http.reset_sessions)()


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """An empty cache, no token, no proxy, and the network allowed."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy",
                 "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    forget_connections()
    yield
    forget_connections()


@pytest.fixture
def use(monkeypatch):
    """Make an address the hub's."""
    def choose(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        for module in (constants, file_download):  # the second in huggingface_hub's older versions
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE",
                                address + "/{repo_id}/resolve/{revision}/{filename}", raising=False)

    return choose


@pytest.fixture
def server():
    """A server in a thread; its state is `server.state`, its address `server.address`."""
    state = Hub()
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    running.daemon_threads = True
    running.state, running.address = state, f"http://127.0.0.1:{running.server_address[1]}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def online(server, use):
    """The state of a hub that answers."""
    use(server.address)
    return server.state


@pytest.fixture
def dead(use):
    """The address of a hub that refuses connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use(f"http://127.0.0.1:{port}")
    return f"127.0.0.1:{port}"


@pytest.fixture
def offline(monkeypatch):
    """Switch the network off, as HF_HUB_OFFLINE does."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def in_cache(name, content=None, commit=COMMIT):
    """Put a file of REPO into the cache, or with `content` None the knowledge that there is no such file."""
    root = Path(constants.HF_HUB_CACHE) / "models--org--net"
    path = root / ("snapshots" if content is not None else ".no_exist") / commit / name
    for folder in (path.parent, root / "refs", root / "snapshots"):
        folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or b"")
    (root / "refs" / "main").write_text(commit)
    return path


def refused(*names, revision=None):
    """The sentence with which the weights of REPO are refused."""
    with pytest.raises(CheckpointError) as refusal:
        hub.hub_file(REPO, names or WEIGHTS, revision)
    return str(refusal.value)


# the cache -----------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(online):
    online.files = {"model.safetensors": b"weights" * 1000}
    path = hub.hub_file(REPO, WEIGHTS)
    assert path.read_bytes() == b"weights" * 1000
    assert Path(constants.HF_HUB_CACHE) in path.parents
    asked = len(online.questions)
    assert asked > 0
    assert hub.hub_file(REPO, WEIGHTS) == path
    assert len(online.questions) == asked


def test_the_next_name_is_taken_where_the_first_is_missing(online, offline):
    online.files = {"pytorch_model.bin": b"old"}
    path = hub.hub_file(REPO, WEIGHTS)
    assert (path.name, path.read_bytes()) == ("pytorch_model.bin", b"old")
    offline()
    assert hub.hub_file(REPO, WEIGHTS) == path


def test_the_first_name_is_taken_where_both_are_there(online):
    online.files = {"pytorch_model.bin": b"old", "model.safetensors": b"new"}
    assert hub.hub_file(REPO, WEIGHTS).read_bytes() == b"new"


def test_a_file_on_another_host_is_followed(online):
    online.files = {"model.safetensors": b"large" * 500}
    online.redirected = {"model.safetensors"}
    assert hub.hub_file(REPO, WEIGHTS).read_bytes() == b"large" * 500


@pytest.mark.parametrize("switch", [False, True], ids=["dead", "offline"])
def test_the_cache_is_enough_where_no_hub_answers(dead, offline, switch):
    path = in_cache("model.safetensors", b"cached")
    if switch:
        offline()
    assert hub.hub_file(REPO, WEIGHTS) == path


def test_a_file_known_to_be_missing_is_passed_over(dead):
    in_cache("model.safetensors")
    path = in_cache("pytorch_model.bin", b"cached")
    assert hub.hub_file(REPO, WEIGHTS) == path


def test_a_file_that_was_missing_is_asked_for_again(online):
    for name in WEIGHTS:
        in_cache(name)
    online.commit, online.files = COMMIT[::-1], {"model.safetensors": b"since then"}
    assert hub.hub_file(REPO, WEIGHTS).read_bytes() == b"since then"


def test_a_revision_is_another_file(online):
    in_cache("model.safetensors", b"of main")
    online.commit, online.files = COMMIT[::-1], {"model.safetensors": b"of v1"}
    assert hub.hub_file(REPO, WEIGHTS, "v1").read_bytes() == b"of v1"
    assert {path.split("/resolve/")[1].split("/")[0] for path in online.heads} == {"v1"}
    assert hub.hub_file(REPO, WEIGHTS).read_bytes() == b"of main"


def test_a_download_that_breaks_off_leaves_nothing_that_is_taken_as_whole(online, offline, monkeypatch):
    content = os.urandom(200_000)
    online.files, online.cut = {"model.safetensors": content}, True
    assert "model.safetensors" in refused()
    assert online.downloads > 0
    online.cut = False
    with monkeypatch.context() as context:
        context.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in refused()
    assert hub.hub_file(REPO, WEIGHTS).read_bytes() == content


# no hub --------------------------------------------------------------------------------------------------------


def says_what_to_do(sentence, command=f"hf download {REPO} model.safetensors"):
    """Every refusal names the file, the repository, the cache folder, and here what to do without a network."""
    for part in ("model.safetensors or pytorch_model.bin of org/net", constants.HF_HUB_CACHE, command, "HF_HOME",
                 "models--org--net"):
        assert part in sentence
    return True


def test_the_offline_switch_is_answered_without_a_question(online, offline):
    online.files = {"model.safetensors": b"weights"}
    offline()
    sentence = refused()
    assert says_what_to_do(sentence)
    assert "offline mode is enabled" in sentence and "HF_HUB_OFFLINE" in sentence
    assert online.questions == []


def test_a_refused_connection(dead):
    sentence = refused()
    assert says_what_to_do(sentence)
    assert f"{dead} cannot be reached" in sentence


def test_the_revision_is_part_of_what_to_do(dead):
    sentence = refused(*WEIGHTS, revision="v1")
    assert says_what_to_do(sentence, f"hf download {REPO} model.safetensors --revision v1")
    assert "revision v1, is not in the cache" in sentence


def test_a_hub_that_never_answers(use, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert says_what_to_do(refused())


def test_a_name_that_is_looked_up_for_ever(use, monkeypatch):
    use("http://hub.example")
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1)
    over = threading.Event()

    def look_up(*_, **__):
        over.wait(60)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        sentence = refused()
    finally:
        over.set()
    assert says_what_to_do(sentence)
    assert "hub.example cannot be reached (no answer within 1 s; HF_HUB_ETAG_TIMEOUT" in sentence


def test_the_wait_is_as_long_as_the_user_sets_it(monkeypatch):
    assert hub._seconds() == hub.ANSWER_SECONDS
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 42)
    assert hub._seconds() == 42


def test_what_answers_is_not_the_hub(online, server):
    online.files, online.commit = {"model.safetensors": b"<html>log in</html>"}, None
    sentence = refused()
    assert says_what_to_do(sentence)
    assert server.address in sentence and "does not seem to be" in sentence


def test_a_proxy_is_used(server, use, monkeypatch):
    use("http://hub.invalid")  # a name that is never found, so only the proxy can know it
    monkeypatch.setenv("HTTP_PROXY", server.address)
    monkeypatch.setenv("http_proxy", server.address)
    server.state.files = {"model.safetensors": b"through the proxy"}
    assert hub.hub_file(REPO, WEIGHTS).read_bytes() == b"through the proxy"


ENVIRONMENT = """
from patchssl.models.hub import hub_file
print(hub_file("org/net", ["model.safetensors"]))
"""


def test_the_environment_says_where(server, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which huggingface_hub reads when it is imported."""
    server.state.files = {"model.safetensors": b"weights"}
    root = Path(patchssl.__file__).parents[1]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"PYTHONPATH": str(root), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.address,
                  "HF_HUB_DISABLE_TELEMETRY": "1"}
    for offline in ("0", "1"):
        done = subprocess.run([sys.executable, "-c", ENVIRONMENT], env=variables | {"HF_HUB_OFFLINE": offline},
                              capture_output=True, text=True, check=True)
        path = Path(done.stdout.strip())
        assert path.read_bytes() == b"weights"
        assert tmp_path / "home" / "hub" in path.parents


# a hub that refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refusal", "says"), [
    ("gated", ["HTTP 403: Access to model org/net is restricted", "ask for access", "hf auth login"]),
    ("gone", ["does not exist, or is private or gated (HTTP 404)", "hf auth login"]),
    ("unknown", ["does not exist, or is private or gated (HTTP 401)", "hf auth login"]),
    ("revision", ["no revision v9"]),
    ("forbidden", ["HTTP 403: No access from here"]),
    ("down", ["HTTP 503", "try again later", "hf download"]),
])
def test_a_refusal_is_asked_for_once_and_explained(online, refusal, says):
    online.refusal = refusal
    sentence = refused(*WEIGHTS, revision="v9")
    assert [part for part in [*says, "model.safetensors or pytorch_model.bin of org/net, revision v9,"]
            if part not in sentence] == []
    assert len(online.questions) == 1


def test_a_refusal_after_the_first_question_is_explained_as_well(online):
    online.files, online.later = {"model.safetensors": b"weights"}, "forbidden"
    assert "access is refused (HTTP 403: No access from here)" in refused()
    assert len(online.questions) > 1


def test_a_refused_token_is_told_from_a_missing_repository(online, monkeypatch):
    online.refusal = "unknown"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub refuses the token of this machine (HTTP 401); run 'hf auth login'" in refused()


def test_a_server_that_knows_nothing_of_repositories(online):
    online.refusal = "nowhere"
    sentence = refused()
    assert says_what_to_do(sentence)
    assert "answers HTTP 404" in sentence
    assert len(online.questions) == len(WEIGHTS)


def test_none_of_the_files_is_in_the_repository(online):
    online.files = {"README.md": b"nothing else"}
    assert "the repository has no such files; see which it has at http" in refused()
    assert len(online.questions) == len(WEIGHTS)


def test_a_cache_that_cannot_be_written(online, tmp_path):
    online.files = {"model.safetensors": b"weights"}
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    assert "the cache cannot be written" in refused()


def test_a_cache_that_is_damaged(dead):
    root = in_cache("model.safetensors", b"weights").parents[2]
    (root / "refs" / "main").write_bytes(b"\xff\xfe")
    assert "cannot be looked for in the cache: " in (sentence := refused())
    assert f"delete the folder {root} " in sentence


@each("name", ["", "a/b/c", "org/net/", "../net", "org/..", "-net", "org/a--b", "https://x.y/a/b",
               "org/net v1", "net.git"])
def test_names_that_no_repository_has(dead, name):
    with pytest.raises(UsageError, match="write ORG/NAME"):
        hub.hub_file(name, WEIGHTS)


@each("revision", ["", "/etc", "../../../x", "a b", "a\\b", "a\nb"])
def test_revisions_that_lead_elsewhere(dead, revision):
    with pytest.raises(UsageError, match="write a branch, a tag or a commit"):
        hub.hub_file(REPO, WEIGHTS, revision)


# JSON ----------------------------------------------------------------------------------------------------------


def test_a_table_is_read_once(online):
    online.files = {"config.json": '{"architecture": "vit", "größe": 3}'.encode()}
    assert hub.hub_json(REPO, "config.json") == {"architecture": "vit", "größe": 3}
    asked = len(online.questions)
    assert hub.hub_json(REPO, "config.json") == {"architecture": "vit", "größe": 3}
    assert len(online.questions) == asked


@each(("content", "says"), [
    (b'{"architecture": ', "is damaged"), (b"", "is damaged"), (b"\xff\xfe{}", "is damaged"),
    (b"[" * 100_000, "is damaged"), (b"[1, 2]", "holds a JSON list, not a table")])
def test_json_that_is_no_table(dead, content, says):
    in_cache("config.json", content)
    with pytest.raises(CheckpointError, match=f"config.json of org/net {says}.*delete the folder .*models--org--net"):
        hub.hub_json(REPO, "config.json")


def test_large_json_is_not_even_downloaded(online):
    online.files = {"config.json": b'{"a": "' + b"x" * hub.JSON_BYTES + b'"}'}
    with pytest.raises(CheckpointError, match="1,000,009 bytes large"):
        hub.hub_json(REPO, "config.json")
    assert [method for method, _, _ in online.questions] == ["HEAD"]


def test_large_json_in_the_cache_is_not_read(dead):
    in_cache("config.json", b'{"a": "' + b"x" * hub.JSON_BYTES + b'"}')
    with pytest.raises(CheckpointError, match="1,000,009 bytes large"):
        hub.hub_json(REPO, "config.json")


# upload --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder as `patchssl export` writes it."""
    root = tmp_path / "exported"
    (root / "more").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "more" / "notes.txt").write_text("notes")
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Network\n")
    return root


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def not_uploaded(folder, **options):
    with pytest.raises(CheckpointError) as refusal:
        hub.upload_folder(folder, REPO, message="Add the network", **options)
    assert f"{folder} cannot be uploaded to {REPO}" in str(refusal.value)
    return str(refusal.value)


@pytest.fixture
def token(monkeypatch):
    """A token that the server knows."""
    monkeypatch.setenv("HF_TOKEN", "hf_right")


@pytest.mark.parametrize("private", [False, True])
def test_all_files_are_uploaded(online, token, folder, private):
    address = hub.upload_folder(folder, REPO, private=private, message="Add the network")
    assert address == f"{constants.ENDPOINT}/{REPO}"
    assert online.uploaded == contents(folder)
    assert (online.message, online.private) == ("Add the network", private)


def test_a_repository_that_is_there_is_added_to(online, token, folder):
    online.exists, online.private = True, True
    hub.upload_folder(folder, REPO, private=True, message="Add the network")
    assert online.uploaded == contents(folder)


def test_nothing_private_goes_to_a_public_repository(online, token, folder):
    online.exists, online.private = True, False
    assert "is there and public" in not_uploaded(folder, private=True)
    assert online.uploaded == {}


def test_an_upload_without_a_token(online, folder):
    assert "no token found" in (sentence := not_uploaded(folder)) and "/settings/tokens" in sentence
    assert online.questions == []


def test_an_upload_with_a_wrong_token(online, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    sentence = not_uploaded(folder)
    assert "token from HF_TOKEN" in sentence and "is invalid" in sentence
    assert "hf_wrong" not in sentence


def test_an_upload_without_the_right_to_write(online, token, folder):
    online.upload_status = 403
    assert "Make sure your token has the correct permissions" in not_uploaded(folder)
    assert online.uploaded == {}


def test_an_upload_without_a_network(dead, token, folder):
    assert f"{dead} cannot be reached" in not_uploaded(folder)


def test_an_upload_to_a_hub_that_never_answers(use, token, folder, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached (no answer within 1 s" in not_uploaded(folder)


def test_an_upload_while_offline(online, token, offline, folder):
    offline()
    assert "please unset the `HF_HUB_OFFLINE`" in not_uploaded(folder)
    assert online.questions == []


@pytest.mark.parametrize(("repo", "there", "says"), [
    ("net", True, "write USER/net"), ("a/b/c", True, "write ORG/NAME"), (REPO, False, "is not a folder")])
def test_uploads_that_are_asked_for_wrongly(dead, folder, tmp_path, repo, there, says):
    with pytest.raises(UsageError, match=says):
        hub.upload_folder(folder if there else tmp_path / "none", repo, message="Add the network")
