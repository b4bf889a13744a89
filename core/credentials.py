"""What must never be shown: secrets of the environment and of URLs, taken out of every text that leaves a program."""

from __future__ import annotations

import json
import os
import re

HIDDEN = "(hidden)"
# Environment variables whose values are secrets, by the words in their names.
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL|WEBHOOK", re.IGNORECASE)
_LEAST_LENGTH = 8  # a shorter value would hide ordinary words
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@\"']+@")
_SIGNED = re.compile(
    r"((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|access_token|token|key|secret)=)[^&\s\"'\\]+",
    re.IGNORECASE,
)
_added: set[str] = set()


def add_secret(value: str) -> None:
    """Hide `value` from now on, in this process."""
    if value:
        _added.add(value)


def hidden(text: str) -> str:
    """`text` without the values of secret environment variables, users of URLs and signatures of requests."""
    secrets = {value for name, value in os.environ.items() if len(value) >= _LEAST_LENGTH and _SECRET_NAME.search(name)}
    for secret in sorted(secrets | _added, key=len, reverse=True):
        # Paths are no secrets: AWS_WEB_IDENTITY_TOKEN_FILE names one.
        if not secret.startswith("/"):
            for written in (secret, json.dumps(secret)[1:-1]):  # `text` may be JSON
                text = text.replace(written, HIDDEN)
    return _SIGNED.sub(rf"\1{HIDDEN}", _USER_OF_URL.sub(f"{HIDDEN}@", text))
