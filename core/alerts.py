"""Events that somebody should hear of: told to a webhook, if there is one. Nothing here stops or slows a run."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.credentials import HIDDEN, add_secret, hidden
from shards.errors import ConfigError

log = logging.getLogger(__name__)

# Events that a person should look at; their lines in events.jsonl have `"level": "alert"`.
ALERTS = frozenset(
    {
        "error", "gave_up", "restart", "save_failed", "mirror_failed", "upload_failed", "checkpoint_passed_over",
        "scale_at_bound", "hang", "lease_lost", "latest_points_nowhere", "slow_rank", "slow_store",
    }
)  # fmt: skip
_WAITING = 64  # alerts at most that wait to be sent; more are dropped
_ENVIRONMENT = "env:"


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """`webhook_url`: where alerts are sent as JSON by POST, or `env:NAME`, the variable that holds it, so that the
    command line does not show it. It is a secret: config.json, curves, events and logs hide it."""

    webhook_url: str | None = None
    timeout_s: float = 5.0
    every_s: float = 60.0  # of one kind of event, one alert in so many seconds

    def __post_init__(self) -> None:
        url = self.webhook_url
        if url and url != HIDDEN and not url.startswith((_ENVIRONMENT, "http://", "https://")):
            raise ConfigError("alerts.webhook_url: write http://..., https://... or env:NAME")
        for name in ("timeout_s", "every_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"alerts.{name}={getattr(self, name)} must be above 0")
        if url and url.startswith("http"):
            _hide(url)


def _hide(url: str) -> None:
    add_secret(url)
    parts = urllib.parse.urlsplit(url)
    for secret in (parts.path.strip("/"), parts.query):  # a library's message may quote these alone
        if len(secret) >= 8:
            add_secret(secret)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # what is meant for one host goes to no other


class Webhook:
    """Sends alerts from a thread of its own, which waits for nobody; what cannot be sent is said once in the log."""

    def __init__(self, config: AlertsConfig, run: str) -> None:
        url = config.webhook_url or ""
        if url.startswith(_ENVIRONMENT):
            name = url.removeprefix(_ENVIRONMENT)
            url = os.environ.get(name, "")
            if not url.startswith(("http://", "https://")):
                raise ConfigError(
                    f"alerts.webhook_url=env:{name}: the variable holds no http:// or https:// URL; set it"
                )
            _hide(url)
        self._url, self._config, self._run = url, config, hidden(run)
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._last: dict[str, float] = {}
        self._warned = False
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._thread: threading.Thread | None = None

    def send(self, event: Mapping[str, Any]) -> None:
        """Returns at once. Of one kind of event, later ones within `every_s` are left out."""
        kind, now = str(event.get("event")), time.monotonic()
        if now - self._last.get(kind, -self._config.every_s) < self._config.every_s:
            return
        self._last[kind] = now
        text = f"{self._run}: {kind}" + (f", {event['message']}" if "message" in event else "")
        body = hidden(json.dumps({"text": text, "run": self._run, **event})).encode()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(body)
        except queue.Full:
            self._warn("too many alerts wait; some were dropped")

    def close(self) -> None:
        """Give what waits one time-out to be sent."""
        if self._thread is not None:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(self._config.timeout_s)

    def _work(self) -> None:
        while (body := self._queue.get()) is not None:
            try:
                request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
                with self._opener.open(request, timeout=self._config.timeout_s):
                    pass
            except urllib.error.HTTPError as error:
                self._warn(f"the server answers {error.code}")
            except Exception as error:  # of a library that may raise anything; the run must go on
                self._warn(type(error).__name__)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("alerts.webhook_url: an alert was not sent (%s); events.jsonl has them all", why)
