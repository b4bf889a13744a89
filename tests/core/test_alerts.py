"""Alerts reach a webhook, and a webhook that is slow, gone or refuses costs a run nothing."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from core import credentials
from core.alerts import ALERTS, AlertsConfig, Webhook
from core.metrics import Events
from core.world import World
from shards.errors import ConfigError
from tests.core.webhook import webhook


def test_alerts_and_only_they_are_sent(tmp_path: Path) -> None:
    with webhook() as (url, told):
        hook = Webhook(AlertsConfig(webhook_url=url), "s3://bucket/runs/a")
        events = Events(tmp_path, World(), on_alert=hook.send)
        for event in ("start", "save", "save_failed", "skip", "error", "error"):
            events.write({"event": event, "message": "no room left"})
        hook.close()
    sent = [json.loads(body) for body in told]
    assert [one["event"] for one in sent] == ["save_failed", "error"]  # one of a kind a minute
    assert sent[0]["text"] == "s3://bucket/runs/a: save_failed, no room left" and sent[0]["rank"] == 0
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {one["event"] for one in lines if one.get("level") == "alert"} == {"save_failed", "error"} <= ALERTS


def test_a_webhook_that_hangs_holds_nobody(tmp_path: Path) -> None:
    hold = threading.Event()
    with webhook(hold=hold) as (url, told):
        hook = Webhook(AlertsConfig(webhook_url=url, timeout_s=0.2, every_s=1e-9), "a")
        events = Events(tmp_path, World(), on_alert=hook.send)
        for number in range(200):
            events.write({"event": "error", "number": number})
        for _ in range(3000):  # the first may still be under way
            if told:
                break
            time.sleep(0.01)
        hook.close()
        hold.set()
    assert 1 <= len(told) < 200 and len((tmp_path / "events.jsonl").read_text().splitlines()) == 200


@pytest.mark.parametrize("status", [302, 404, 500])
def test_what_cannot_be_sent_is_said_once_without_the_url(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with webhook(status) as (url, told), caplog.at_level(logging.WARNING):
        hook = Webhook(AlertsConfig(webhook_url=f"{url}/planted-path-secret", every_s=1e-9), "a")
        for _ in range(3):
            hook.send({"event": "error"})
            time.sleep(0.001)
        hook.close()
    (record,) = caplog.records
    assert str(status) in record.getMessage() and "planted" not in record.getMessage()
    assert len(told) == 3  # and nothing followed a redirect


def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    with webhook() as (url, _):
        pass
    hook = Webhook(AlertsConfig(webhook_url=url), "a")
    hook.send({"event": "error"})
    hook.close()
    assert len(caplog.records) == 1


def test_bad_settings_are_refused_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        AlertsConfig(webhook_url="ftp://planted")
    assert "planted" not in str(refused.value)
    monkeypatch.setenv("SITE_HOOK", "planted")
    with pytest.raises(ConfigError, match="SITE_HOOK") as refused:
        Webhook(AlertsConfig(webhook_url="env:SITE_HOOK"), "a")
    assert "planted" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"alerts.timeout_s=0"):
        AlertsConfig(timeout_s=0)


def test_credentials_are_taken_out_of_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token-file")
    monkeypatch.setenv("MY_TOKEN", "short")
    text = "at http://user:pass@host/b?X-Amz-Signature=abc&x=1 planted-secret /var/run/token-file short"
    expected = "at http://(hidden)@host/b?X-Amz-Signature=(hidden)&x=1 (hidden) /var/run/token-file short"
    assert credentials.hidden(text) == expected
    monkeypatch.setenv("SITE_PASSWORD", 'pl\u00e4nted"and\\quoted')
    text, expected = f"{text} {os.environ['SITE_PASSWORD']}", f"{expected} (hidden)"
    Events(tmp_path, World()).write({"event": "error", "message": text})
    assert json.loads((tmp_path / "events.jsonl").read_text())["message"] == expected
