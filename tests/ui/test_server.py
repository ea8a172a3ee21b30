"""Who may use the page: requests as a stranger's page, or another name for this machine, makes them."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakin.cli.app import run as run_command
from lorakin.errors import OutputError, SettingError
from lorakin.ui import server
from ui.conftest import Served

START = "/gradio_api/queue/join"


@pytest.fixture(scope="module", params=[False, True], ids=["open", "password"])
def address(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, bool]]:
    words = ["--password", "a long one"] if request.param else []
    served = Served(tmp_path_factory.mktemp("runs"), *words)
    yield served.port, request.param
    served.stop()


def asked(port: int, method: str, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body=b"{}" if method == "POST" else None, headers=sent)
    answer = connection.getresponse()
    found = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, answer.read().decode(), found


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Host": "evil.example"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/config", START, "/gradio_api/upload", "/login"])
def test_a_stranger_is_refused(
    address: tuple[int, bool], headers: dict[str, str], path: str
) -> None:
    for method in ("GET", "POST"):
        assert asked(address[0], method, path, **headers)[0] == 403


def test_its_own_page_is_not(address: tuple[int, bool]) -> None:
    port, has_password = address
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    status, page, headers = asked(port, "GET", "/", **own)
    assert status == 200 and "frame-ancestors 'none'" in headers["content-security-policy"]
    assert ("gradio" in page) and "fonts.googleapis" not in page
    status, _, _ = asked(port, "POST", START, **own, Content_Type="application/json")
    assert status == 401 if has_password else status in (200, 422)


def test_a_link_elsewhere_may_open_the_page(address: tuple[int, bool]) -> None:
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert asked(address[0], "GET", "/", **link)[0] == 200


def test_other_machines_need_a_password() -> None:
    with pytest.raises(SettingError, match="give a --password"):
        server.check_host("0.0.0.0", None)
    with pytest.raises(SettingError, match="is empty"):
        server.check_host("0.0.0.0", "")
    server.check_host("0.0.0.0", "a long one")
    server.check_host("::1", None)


def test_the_next_free_port_is_taken_but_not_in_place_of_the_users() -> None:
    with server.listening("127.0.0.1", None) as first:
        with server.listening("127.0.0.1", None) as second:
            assert second.getsockname()[1] > first.getsockname()[1] >= server.PORT
        taken = first.getsockname()[1]
        with pytest.raises(OutputError, match=f"--port {taken}"):
            server.listening("127.0.0.1", taken)
    with pytest.raises(OutputError, match="--host 192.0.2.1"):
        server.listening("192.0.2.1", None)


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_command(["ui"]) == 2
    assert "pip install 'lorakin[ui]'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run_command(["ui", "--no-browser", "--runs", str(tmp_path / "file" / "runs")]) == 2
    assert "cannot be made" in capsys.readouterr().err
