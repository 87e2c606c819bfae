"""The page in a browser, as its user has it."""

import json
import shutil
import threading
import time
from urllib.parse import urlsplit

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from lsnet_d2.webpage.__main__ import make_server
from lsnet_d2.webpage.answer import Limits
from lsnet_d2.webpage.app import create_app
from lsnet_d2.webpage.examples import find_examples

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER),
        reason="there is no chromium with chromedriver (Debian: chromium, chromium-driver)",
    ),
]

LIMITS = Limits(megabytes=0.05, megapixels=1)


@pytest.fixture
def address(predictor):
    app = create_app(
        predictor,
        examples=find_examples(None, predictor.metadata),
        limits=LIMITS,
        threshold=0.0,
        title="a model",
    )
    server = make_server(app, "127.0.0.1", 0, LIMITS)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield "http://{}:{}/".format(*server.socket.getsockname())
    server.trigger.pull_trigger(server.close)
    thread.join(timeout=10)


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # nothing else can be reached, by the page or by the browser of itself
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(tmp_path / "downloads")}
    )
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


class Page:
    """What a user does and sees."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)

    def find(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition):
        return WebDriverWait(self.browser, 60).until(lambda _: condition())

    def upload(self, path):
        (chooser,) = self.find("#file")
        chooser.send_keys(str(path))
        self.wait(lambda: self.status().startswith(path.name + ":") and not self.find(".busy"))

    def status(self):
        return self.find("#status")[0].text

    def set_threshold(self, value):
        self.browser.execute_script(
            "const slider = document.getElementById('threshold'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input', { bubbles: true }));",
            value,
        )

    def count(self, kind):
        return len(self.find(f"#picture .{kind}"))

    def fills(self):
        return {path.get_attribute("fill") for path in self.find("#picture .contour")}

    def requests(self):
        """URLs that were asked for since the last call, other than the browser's own pages."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")
        ]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
            and not message["params"]["request"]["url"].startswith(("chrome", "data:", "blob:"))
        ]


def wait_for_file(path):
    for _ in range(300):
        if path.is_file():
            return path
        time.sleep(0.1)
    raise AssertionError(f"no {path.name} in {list(path.parent.iterdir())}")


def test_a_picture_from_upload_to_files(address, browser, birds, predictor, tmp_path):
    page = Page(browser, address)
    page.upload(birds / "val" / "000.jpg")
    expected = predictor(birds / "val" / "000.jpg")
    scores = sorted(expected.scores.tolist(), reverse=True)
    total = len(scores)
    assert page.count("box") == page.count("contour") == total > 5
    assert page.count("extreme-point") == 4 * total and page.count("extreme-lines") == 0
    assert page.count("keypoint") > 5 and page.count("bone") > 0
    assert len(page.find("#detections tr")) == total
    first = page.find("#detections tr")[0].text.split(" ", 2)
    names = predictor.metadata.thing_classes
    assert first[:2] == [names[expected.pred_classes[0]], f"{scores[0]:.2f}"]
    asked = page.requests()
    assert len([url for url in asked if "/detect" in url]) == 1

    # a slider's step is 0.01
    threshold = round((scores[2] + scores[3]) / 2, 2)
    kept = sum(score >= threshold for score in scores)
    assert 0 < kept < total
    page.set_threshold(threshold)
    assert page.count("box") == len(page.find("#detections tr")) == kept
    assert f"{kept} of {total} found" in page.find("#count")[0].text
    for part, kind in (("contour", "contour"), ("keypoints", "bone"), ("box", "box")):
        page.find(f"#parts input[value={part}]")[0].click()
        assert page.count(kind) == 0
    assert page.count("extreme-lines") == kept  # as there is no contour
    page.find("#parts input[value=contour]")[0].click()
    assert "none" not in page.fills()
    Select(page.find("#contours")[0]).select_by_visible_text("outlined")
    assert page.fills() == {"none"}

    for kind in ("coco", "labelme", "geojson", "picture"):
        page.find(f"#downloads button[data-kind={kind}]")[0].click()
        time.sleep(0.3)  # browsers ask about several files at once
    downloads = tmp_path / "downloads"
    results = expected[expected.scores >= threshold]
    for name, content in (
        ("000_coco.json", results.to_coco(0)),
        ("000.json", results.to_labelme(image_path="000.jpg")),
        ("000.geojson", results.to_geojson()),
    ):
        saved = json.loads(wait_for_file(downloads / name).read_text())
        assert saved == json.loads(json.dumps(content))
    with Image.open(wait_for_file(downloads / "000_found.png")) as picture:
        assert picture.width > picture.height > 400

    assert page.requests() == []  # all of that without the server
    assert {urlsplit(url).hostname for url in asked} == {"127.0.0.1"}
    assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert browser.save_screenshot(str(tmp_path / "page.png"))


def test_refusals_and_examples_on_a_phone(address, browser, tmp_path):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
    )
    page = Page(browser, address)
    for name, content, message in (
        ("large.jpg", bytes(LIMITS.bytes + 1), "more than the 0.05 MB accepted here"),
        ("text.jpg", b"no image", "not a complete image file: it begins like no kind"),
    ):
        (tmp_path / name).write_bytes(content)
        page.upload(tmp_path / name)
        assert message in page.status()
        assert page.find("#status.error") and not page.find("#result")[0].is_displayed()
    assert len([url for url in page.requests() if "/detect" in url]) == 1  # not for the large one

    browser.execute_script(
        "for (const name of ['first.jpg', 'second.jpg']) {"
        "  const dataTransfer = new DataTransfer();"
        "  dataTransfer.items.add(new File(['no image'], name));"
        "  document.dispatchEvent(new DragEvent('drop', { dataTransfer }));"
        "}"
    )
    page.wait(lambda: not page.find(".busy"))
    assert page.status().startswith("first.jpg: not a complete image file")
    assert "second.jpg was not looked at" in page.status() and page.find("#status.error")
    assert len([url for url in page.requests() if "/detect" in url]) == 1

    page.find(".example")[1].click()
    page.wait(lambda: page.status().startswith("001.jpg: 128 × 96 pixels"))
    assert not page.find("#status.error") and page.count("box") > 5
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width == 390  # nothing sticks out
    assert {urlsplit(url).hostname for url in page.requests()} == {"127.0.0.1"}
    assert browser.save_screenshot(str(tmp_path / "phone.png"))
