"""The page in headless Chromium, against a server on the tiny policy."""

import io
import shutil
import socket
import threading
from contextlib import contextmanager

import pytest
import tiny_rewriter
import uvicorn
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from grape_jax.serving import app, galleries
from grape_jax.serving.engine import Engine
from grape_jax.serving.limits import Limits

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver"),
]


@contextmanager
def served(rewriter, split="train"):
    """The address of a server in a thread."""
    gallery = rewriter.gallery(split)
    engine = Engine.of(rewriter, gallery, 1)
    engine.warm()
    examples = galleries.examples(rewriter, gallery, split)
    made = app.make(engine, Limits(batch=1, rewrite_timeout=60, request_timeout=60), examples)
    running = uvicorn.Server(uvicorn.Config(made, log_level="warning"))
    with socket.socket() as where:
        where.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{where.getsockname()[1]}"
        thread = threading.Thread(target=running.run, args=([where],))
        thread.start()
        yield address
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def words(folder):
    with served(tiny_rewriter.load(tiny_rewriter.emoji_config(folder))) as address:
        yield address


@pytest.fixture(scope="module")
def composed(folder, tmp_path_factory):
    config = tiny_rewriter.composed_config(folder, tmp_path_factory.mktemp("cirr"))
    with served(tiny_rewriter.load(config)) as address:
        yield address


def until(browser, condition):
    # The page may draw its results again while they are read.
    ignored = [StaleElementReferenceException]
    return WebDriverWait(browser, 60, ignored_exceptions=ignored).until(lambda _: condition())


def open_page(browser, address):
    browser.get(address)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "body[data-ready]"))


def one(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def names(browser, side):
    found = browser.find_elements(By.CSS_SELECTOR, f"#{side}-matches figcaption")
    return [caption.text for caption in found]


def ask(browser, text):
    box = one(browser, "#query")
    box.clear()
    box.send_keys(text, Keys.ENTER)
    until(browser, lambda: len(names(browser, "rewritten")) == 12)


def complaints(browser):
    """Messages on the console, and requests to elsewhere."""
    logged = [entry["message"] for entry in browser.get_log("browser")]
    asked = [entry["message"] for entry in browser.get_log("performance")]
    foreign = [x for x in asked if '"url":"http' in x and '"url":"http://127.0.0.1' not in x]
    return logged + [x for x in foreign if "requestWillBeSent" in x]


def test_a_search_shows_both_wordings_and_an_edit_searches_again(browser, words):
    open_page(browser, words)
    browser.get_log("performance")
    ask(browser, "red apple")
    assert "red apple" in one(browser, "#raw-words").text
    assert names(browser, "raw")[0].startswith("1. ")
    pictures = browser.find_elements(By.CSS_SELECTOR, "#raw-matches img")
    until(browser, lambda: all(x.get_property("naturalWidth") for x in pictures))
    before, raw = names(browser, "rewritten"), names(browser, "raw")
    box = one(browser, "#rewrite")
    box.clear()
    box.send_keys("green leaf", Keys.ENTER)
    until(browser, lambda: names(browser, "rewritten") != before)
    assert names(browser, "raw") == raw and one(browser, "#rewrite").get_property("value")
    assert any("(new)" in name for name in names(browser, "rewritten"))
    assert not complaints(browser)


def test_an_example_is_searched_by_keyboard(browser, words):
    open_page(browser, words)
    example = browser.find_elements(By.CSS_SELECTOR, "#examples button")[1]
    example.send_keys(Keys.ENTER)
    until(browser, lambda: len(names(browser, "rewritten")) == 12)
    assert one(browser, "#raw-words").text == example.text
    one(browser, "#query").click()
    one(browser, "#query").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("type") == "submit"


def test_an_error_is_said_and_the_next_search_works(browser, words):
    open_page(browser, words)
    browser.execute_script("document.getElementById('query').removeAttribute('maxlength')")
    box = one(browser, "#query")
    browser.execute_script("arguments[0].value = 'x'.repeat(2000)", box)
    box.send_keys(Keys.ENTER)
    message = one(browser, "#message")
    until(browser, message.is_displayed)
    assert "1000" in message.text and message.get_attribute("role") == "alert"
    browser.get_log("browser")  # names the status 422
    ask(browser, "red apple")
    assert not message.is_displayed() and not complaints(browser)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser, words, width):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        open_page(browser, words)
        ask(browser, "red apple")
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        heights = [
            box.size["height"]
            for box in browser.find_elements(By.CSS_SELECTOR, "input, button")
            if box.is_displayed()
        ]
        assert min(heights) >= 36  # large enough for a finger
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_picture_is_chosen_from_the_gallery_or_uploaded(browser, composed, tmp_path):
    open_page(browser, composed)
    box = one(browser, "#query")
    box.send_keys("make it green", Keys.ENTER)
    until(browser, one(browser, "#message").is_displayed)
    assert "picture" in one(browser, "#message").text

    one(browser, "#choose").click()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#pictures button"))
    chosen = browser.find_elements(By.CSS_SELECTOR, "#pictures button")[3]
    name = chosen.text
    chosen.send_keys(Keys.ENTER)
    until(browser, one(browser, "#chosen").is_displayed)
    assert one(browser, "#chosen-name").text == name
    box.send_keys(Keys.ENTER)
    until(browser, lambda: len(names(browser, "rewritten")) == 12)
    assert not any(name in found for found in names(browser, "raw"))

    content = io.BytesIO()
    Image.new("RGB", (30, 30), "green").save(content, "png")
    (tmp_path / "green.png").write_bytes(content.getvalue())
    before = names(browser, "raw")
    one(browser, "#file").send_keys(str(tmp_path / "green.png"))
    until(browser, lambda: one(browser, "#chosen-name").text == "green.png")
    box.send_keys(Keys.ENTER)
    until(browser, lambda: names(browser, "raw") != before)
    assert not complaints(browser)
