"""The curves and pictures that the README promises are there for a person who opens TensorBoard in a browser."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from core.metrics import NAMES, Metrics, contact_sheet
from core.world import World
from shards.keyed import uniform

pytestmark = [pytest.mark.browser, pytest.mark.timeout(420)]

CURVES = (*NAMES, "loss/image_to_text", "eval/validation/loss", "eval/zero_shot/macro")
PICTURES = ("batch/pixel_values",)
LAST_STEP = 5

# TensorBoard 2 renders its "Time series" cards without shadow roots. A card's title is its tag, cut by line breaks;
# under the curve stands a table of the value at one step. A filtered page holds twelve cards.
CARDS = "return [...document.querySelectorAll('card-view')].map(card => card.innerText)"
PICTURE_WIDTHS = "return [...document.querySelectorAll('image-card img')].map(image => image.naturalWidth)"


def until(condition, what: str, timeout_s: float = 120.0):  # type: ignore[no-untyped-def]
    """The first true value of `condition()`; fails with `what` when none comes."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail(f"after {timeout_s:g} s still not seen: {what}")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        missing = [name for name, found in (("chromium", chromium), ("chromium-driver", driver)) if not found]
        pytest.skip(f"needs a headless browser; on Debian: apt-get install {' '.join(missing)}")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, from the dev extra")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,2400"):
        options.add_argument(argument)
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield session
    finally:
        session.quit()


@pytest.fixture(scope="module")
def tensorboard(run_directory: Path) -> Iterator[str]:
    """Address of a TensorBoard server on loopback that reads one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(run_directory),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(address + "data/plugin/scalars/tags", timeout=5) as reply:
                return b"loss/total" in reply.read()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    try:
        until(answers, "TensorBoard serving loss/total")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of five steps leaves for TensorBoard, written by the program's own writer."""
    folder = tmp_path_factory.mktemp("run")
    metrics = Metrics(folder, World(), first_step=0)
    for step in range(1, LAST_STEP + 1):
        metrics.scalars(step, dict.fromkeys(CURVES, 1.0 / step))
    pixels = uniform(0, "pictures of a test", draws=12 * 32 * 32)
    metrics.picture(1, PICTURES[0], contact_sheet(torch.from_numpy(pixels).reshape(12, 1, 32, 32)))
    metrics.close()
    return folder


def card(browser, tag: str) -> str:  # type: ignore[no-untyped-def]
    """Text of the card called `tag`, waited for."""

    def find() -> str | None:
        texts = browser.execute_script(CARDS)
        return next((text for text in texts if "".join(text.split()).startswith(tag)), None)

    return until(find, f"a card called {tag}")


def show(browser, address: str, tags: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    """Open the page of these tags' cards."""
    browser.get(f"{address}?tagFilter=^({'|'.join(tags)})$#timeseries")


@pytest.mark.parametrize("tags", [CURVES[first : first + 6] for first in range(0, len(CURVES), 6)], ids=" ".join)
def test_curves_show(browser, tensorboard: str, tags: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    show(browser, tensorboard, tags)
    for tag in tags:
        until(
            lambda tag=tag: "Smoothed" in card(browser, tag) and str(LAST_STEP) in card(browser, tag).split(),
            f"the last step of {tag}",
        )


@pytest.mark.parametrize("tag", PICTURES)
def test_picture_shows(browser, tensorboard: str, tag: str) -> None:  # type: ignore[no-untyped-def]
    show(browser, tensorboard, [tag])
    card(browser, tag)
    widths = until(lambda: browser.execute_script(PICTURE_WIDTHS), f"a picture in the card {tag}")
    assert min(widths) > 0
