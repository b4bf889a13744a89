"""The curves and pictures that the README promises are there for a person who opens TensorBoard in a browser."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

CURVES = ("loss/total", "optim/lr", "optim/grad_norm", "throughput/samples_per_s", "time/step_s", "data/skipped")
LAST_STEP = 4
PICTURES = ("batch/images",)

# TensorBoard 2 renders its "Time series" cards without shadow roots. A card's title is its tag, cut by line breaks; under
# the curve stands a table of the value at one step.
CARDS = "return [...document.querySelectorAll('card-view')].map(card => card.innerText)"
PICTURE_WIDTHS = "return [...document.querySelectorAll('image-card img')].map(image => image.naturalWidth)"


def until(condition, what: str, timeout_s: float = 60.0):  # type: ignore[no-untyped-def]
    """The first true value of `condition()`; fails with `what` when none comes."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    SESSION.save_screenshot("/tmp/front/shot.png")
    open("/tmp/front/page.html", "w").write(SESSION.page_source)
    print(SESSION.execute_script("return document.body.innerText"))
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
    from torch.utils.tensorboard import SummaryWriter
    import numpy as np

    folder = tmp_path_factory.mktemp("run")
    writer = SummaryWriter(str(folder / "tb"))
    for step in range(5):
        for tag in CURVES:
            writer.add_scalar(tag, step * 1.5, step)
    writer.add_image(PICTURES[0], np.random.default_rng(0).random((1, 32, 48), dtype=np.float32), 1)
    writer.close()
    return folder


@pytest.fixture(scope="module")
def page(browser, tensorboard: str):  # type: ignore[no-untyped-def]
    """The browser, on one page with a card for every named tag."""
    browser.get(f"{tensorboard}?tagFilter=^({'|'.join((*CURVES, *PICTURES))})$#timeseries")
    return browser


def card(page, tag: str) -> str:  # type: ignore[no-untyped-def]
    """Text of the card called `tag`, waited for."""

    def find() -> str | None:
        texts = page.execute_script(CARDS)
        return next((text for text in texts if "".join(text.split()).startswith(tag)), None)

    return until(find, f"a card called {tag}")


@pytest.mark.parametrize("tag", CURVES)
def test_curve_shows(page, tag: str) -> None:  # type: ignore[no-untyped-def]
    until(
        lambda: "Smoothed" in card(page, tag) and str(LAST_STEP) in card(page, tag).split(), f"the last step of {tag}"
    )


@pytest.mark.parametrize("tag", PICTURES)
def test_picture_shows(page, tag: str) -> None:  # type: ignore[no-untyped-def]
    card(page, tag)
    widths = until(lambda: page.execute_script(PICTURE_WIDTHS), f"a picture in the card {tag}")
    assert min(widths) > 0
