"""A server on loopback that speaks as much of the OpenAI protocol as we use, and answers as a test wants it to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BORDERED = re.compile(r"===== report ([0-9a-f]{16}) =====\n(.*)\n===== report \1 =====", re.DOTALL)
FINDINGS = {"effusion": "pleural_effusion", "épanchement": "pleural_effusion", "nodule": "nodule"}


class ModelServer:
    """`with ModelServer(answer) as server`: `answer(request)` gives the text of the message, or does worse to it.

    It may return bytes (the whole body of the response), an int (a status) or a (status, headers) pair instead.
    `requests` holds the bodies that came, `headers` what was sent with them.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer, self.requests, self.headers = answer, list[dict[str, Any]](), list[dict[str, str]]()
        self.at_once, self.most_at_once = 0, 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    self.reply(outer.answer(body))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with lock:
                        outer.at_once -= 1

            def reply(self, result: Any) -> None:
                status, headers = 200, dict[str, str]()
                if isinstance(result, tuple):
                    status, headers = result
                elif isinstance(result, int):
                    status = result
                content = result if isinstance(result, bytes) else completion(result).encode()
                if status != 200:  # servers quote what they were sent
                    content = json.dumps({"error": {"message": json.dumps(outer.requests[-1])}}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *arguments: object) -> None:  # clients that went away
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ModelServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(text: object, finish_reason: str = "stop") -> str:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "fake"}
    return json.dumps({**head, "choices": [choice], "usage": usage})


def report_in(request: dict[str, Any]) -> str:
    """The report that a request asks about."""
    found = BORDERED.fullmatch(request["messages"][1]["content"])
    assert found is not None
    return found[2]


def read_well(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of an honest model that knows two findings and the pleura."""
    report = report_in(request)
    entities, about = [], []
    for sentence in re.findall(r"[^.]+\.", report):
        for word, concept in FINDINGS.items():
            if word in sentence.lower():
                denied = re.search(r"\b(no|pas|sans)\b", sentence.lower())
                place = sentence.lower().index(word)
                entities.append(
                    {
                        "concept": concept,
                        "quote": sentence[place : place + len(word)],
                        "context": sentence.strip(),
                        "status": "absent" if denied else "present",
                        "laterality": "left" if "left" in sentence.lower() else "none",
                        "position": "left" if "left" in sentence.lower() else "",
                    }
                )
                about.append(sentence.strip())
    present = any(entity["status"] == "present" for entity in entities)
    pleura = {"anatomy": "pleura", "status": "abnormal" if present else "normal", "findings": about, "impression": []}
    return {"entities": entities, "anatomy": [pleura] if about else []}


def well(request: dict[str, Any]) -> str:
    """The same as the text of a message."""
    return json.dumps(read_well(request))


def slowly(delay_s: float) -> Callable[[dict[str, Any]], str]:
    """Well, after a while."""

    def answer(request: dict[str, Any]) -> str:
        time.sleep(delay_s)
        return well(request)

    return answer
