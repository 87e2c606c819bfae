"""The application through HTTP, on a server of the kind that the command starts."""

import http.client
import json
import threading
import time

import pytest

from lsnet_d2.data.images import ImageError
from lsnet_d2.webpage.__main__ import make_server
from lsnet_d2.webpage.answer import Limits
from lsnet_d2.webpage.app import create_app, is_loopback
from lsnet_d2.webpage.examples import find_examples

OCTETS = {"Content-Type": "application/octet-stream"}
LIMITS = Limits(megabytes=0.1, megapixels=0.1)


@pytest.fixture
def serve():
    """Starts servers of applications; a request to them gives status, headers and content."""
    servers = []

    def start(app, limits=LIMITS):
        server = make_server(app, "127.0.0.1", 0, limits)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))

        def ask(method, path, body=None, headers=None):
            connection = http.client.HTTPConnection(*server.socket.getsockname(), timeout=60)
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            connection.close()
            is_json = response.getheader("Content-Type", "").startswith("application/json")
            return response.status, response.headers, json.loads(content) if is_json else content

        return ask

    yield start
    for server, thread in servers:
        server.trigger.pull_trigger(server.close)  # by the thread that waits for requests
        thread.join(timeout=10)


@pytest.fixture
def ask(serve, predictor):
    return serve(create_app(predictor, limits=LIMITS, title="a <model>"))


def test_detections_of_a_picture(ask, birds, predictor):
    data = (birds / "val" / "000.jpg").read_bytes()
    status, headers, content = ask("POST", "/detect?name=val%2F000.jpg", data, OCTETS)
    assert status == 200 and headers["Cache-Control"] == "no-store"
    expected = predictor(birds / "val" / "000.jpg")
    assert len(content["detections"]) == len(expected) > 5
    assert content["coco"] == json.loads(json.dumps(expected.to_coco(0)))
    assert content["labelme"] == expected.to_labelme()
    assert content["geojson"] == json.loads(json.dumps(expected.to_geojson()))
    assert {found["label"] for found in content["detections"]} <= {"ball", "bird", "box"}


def test_the_page_names_no_other_host(ask):
    status, headers, page = ask("GET", "/")
    page = page.decode()
    assert status == 200 and "a &lt;model&gt;" in page
    assert "0.1 MB and 0.1" in " ".join(page.split())
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    for path in ("/static/page.js", "/static/page.css"):
        status, _, text = ask("GET", path)
        assert status == 200
        page += text.decode()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def refused(response):
    status, _, content = response
    assert list(content) == ["error"]
    return status, content["error"]


def test_what_is_refused(ask, birds):
    data = (birds / "val" / "000.jpg").read_bytes()
    assert refused(ask("POST", "/detect?name=a.png", b"no image", OCTETS)) == (
        400,
        "a.png: not a complete image file: it begins like no kind of image that is known",
    )
    status, message = refused(ask("POST", "/detect?name=a.jpg", data[:-200], OCTETS))
    assert status == 400 and message.startswith("a.jpg: not a complete image: ")
    assert refused(ask("POST", "/detect", bytes(LIMITS.bytes), OCTETS))[0] == 400
    # the server refuses it before it is read; the page has words for it
    assert ask("POST", "/detect", bytes(LIMITS.bytes + 1), OCTETS)[0] == 413
    assert refused(ask("POST", "/detect", data)) == (415, "415 Unsupported Media Type")
    assert refused(ask("GET", "/detect"))[0] == 405
    for path in ("/nothing", "/examples/0", "/examples/0/thumbnail", "/static/../app.py"):
        assert refused(ask("GET", path))[0] == 404


def test_too_large_by_the_application_itself(predictor):
    client = create_app(predictor, limits=LIMITS).test_client()
    response = client.post("/detect", data=bytes(LIMITS.bytes + 1), headers=OCTETS)
    message = "the file has more than the 0.1 MB accepted here (--max-megabytes)"
    assert (response.status_code, response.json) == (413, {"error": message})


def test_another_name_of_this_machine_is_refused(serve, predictor):
    ask = serve(create_app(predictor))
    for host, status in (("localhost:8000", 200), ("[::1]:1", 200), ("evil.example", 400)):
        assert ask("GET", "/", headers={"Host": host})[0] == status
    everywhere = serve(create_app(predictor, only_local=False))
    assert everywhere("GET", "/", headers={"Host": "gpu.example"})[0] == 200


class Failing:
    metadata = None

    def __init__(self, error):
        self.error = error

    def __call__(self, image):
        raise self.error


def test_a_fault_shows_no_traceback(serve, birds, caplog):
    data = (birds / "val" / "000.jpg").read_bytes()
    ask = serve(create_app(Failing(RuntimeError("secret of /home"))))
    assert refused(ask("POST", "/detect", data, OCTETS)) == (
        500,
        "this picture failed by a fault of the program; its log says more",
    )
    assert "secret of /home" in caplog.text and "Traceback" in caplog.text
    ask = serve(create_app(Failing(ImageError("a.jpg: too\n narrow"))))
    assert refused(ask("POST", "/detect", data, OCTETS)) == (400, "a.jpg: too narrow")


def test_one_picture_at_a_time(serve, birds, predictor):
    data = (birds / "val" / "000.jpg").read_bytes()
    running, most = [], []

    class Slow:
        metadata = None

        def __call__(self, image):
            running.append(image)
            most.append(len(running))
            time.sleep(0.1)
            results = predictor(image)
            running.pop()
            return results

    ask = serve(create_app(Slow()))
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(ask("POST", "/detect", data, OCTETS)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert statuses == [200] * 4 and most == [1] * 4


def test_examples(serve, birds, predictor):
    examples = find_examples(None, predictor.metadata)
    assert [example.path.name for example in examples] == ["000.jpg", "001.jpg", "002.jpg"]
    ask = serve(create_app(predictor, examples=examples))
    assert ask("GET", "/examples/1")[2] == (birds / "val" / "001.jpg").read_bytes()
    assert ask("GET", "/examples/1/thumbnail")[2].startswith(b"\xff\xd8")
    assert ask("GET", "/examples/3")[0] == 404
    assert b'data-name="002.jpg"' in ask("GET", "/")[2]


@pytest.mark.parametrize(
    "host, expected",
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("gpu.example", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) == expected
