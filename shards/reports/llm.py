"""What a report states, read by a language model behind any server that speaks the OpenAI protocol.

One call a report, no tools, no memory between reports: text in one report can at worst make the answer about itself
wrong. The answer is JSON of a closed schema that quotes the report; the spans are found here, and an answer with words
that do not stand in the report is sent back with the reason. Nothing but words of the report and terms of our lists is
taken over. No text of a report or answer reaches a log or an error, and the API key comes from the environment only.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from shards.errors import ConfigError, DataError
from shards.reports.llm_cache import AnswerCache, Answered

if TYPE_CHECKING:
    import openai

API_KEY_VARIABLE = "OPENAI_API_KEY"
PROMPTS = Path(__file__).with_name("prompts")
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
LISTED_MAX = 400  # entities, anatomies or quotes of one answer; more is a model that repeats itself
# After this many reports in a row without any answer the server counts as gone, and the rest does not wait for it.
SILENT_MAX = 3
REQUEST_REFUSED = "request refused"
PROBE = "FINDINGS: The heart is normal in size. There is no pleural effusion.\n\nIMPRESSION: Normal chest."

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which server, which model, and how patient to be with them."""

    url: str  # of the API, as http://127.0.0.1:8000/v1
    model: str
    allow_remote: bool = False  # the text, de-identified, may leave this machine
    json_schema: bool = True  # the server constrains answers; else the schema stands in the prompt only
    when_gone: Literal["rules", "stop"] = "stop"  # what becomes of reports when the server does not answer
    concurrency: int = 8  # calls at once
    timeout_s: float = 120.0  # of one call, first byte to last
    tries: int = 5  # of one call that met silence, 429 or a fault of the server
    answers: int = 3  # asked for at most, the later ones with the reason against the one before
    answer_tokens: int = 8192
    cache: Path | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("--llm: no URL of an API; give e.g. http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(f"--llm: leave credentials and ?query out of the URL; the key goes to {API_KEY_VARIABLE}")
        if not self.model.strip():
            raise ConfigError("--model is missing: name the model as the server at --llm does")
        if not self.allow_remote and not is_loopback(parts.hostname):
            raise ConfigError(
                f"--llm {self.url}: host {parts.hostname} is another machine, and report text would leave this one; "
                "run the model here, or state with --allow-remote that the text may leave"
            )
        for name in ("concurrency", "timeout_s", "tries", "answers", "answer_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--llm: {name}={getattr(self, name)} must be above 0")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name: no look-up, which another machine would answer."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class LLMUnreachableError(DataError):
    """The server did not answer after all retries, and the run was told to stop then."""


class _RefusedError(ValueError):
    """Why an answer, or a report by the server, was refused; one of few reasons, without a word of either."""


class _SilentError(Exception):
    """No usable answer from the server after all tries."""


# --- the answer ---


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnsweredEntity(_Closed):
    """A finding that the report mentions; `context` is the clause that `quote` and `position` stand in."""

    concept: str
    quote: str
    context: str
    status: Literal["present", "absent", "possible"]
    laterality: Literal["left", "right", "bilateral", "none"]
    position: str


class AnsweredAnatomy(_Closed):
    """The sentences of the report about one anatomy."""

    anatomy: str
    status: Literal["normal", "abnormal"]
    findings: list[str]
    impression: list[str]


class Answer(_Closed):
    """All that a model is asked for."""

    entities: list[AnsweredEntity]
    anatomy: list[AnsweredAnatomy]


@dataclass(frozen=True, kw_only=True)
class LocatedEntity:
    """An answered finding with the places of its words in the document; `position` None where none was given."""

    concept: str
    span: Span
    context: Span
    status: Literal["present", "absent", "possible"]
    laterality: Literal["left", "right", "bilateral"] | None
    position: Span | None


@dataclass(frozen=True, kw_only=True)
class LocatedAnatomy:
    """An answered anatomy with the places of its sentences."""

    anatomy: str
    status: Literal["normal", "abnormal"]
    findings: tuple[Span, ...]
    impression: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Located:
    """An answer whose every word stands in the document; both lists in the order of the text."""

    entities: tuple[LocatedEntity, ...]
    anatomy: tuple[LocatedAnatomy, ...]


class _Folded:
    """A document in small letters with single blanks, each character knowing where it came from."""

    def __init__(self, document: str) -> None:
        letters: list[str] = []
        self.places: list[int] = []
        for place, character in enumerate(document):
            if not character.isspace():
                small = character.lower()
                letters.append(small)
                self.places += [place] * len(small)
            elif letters and letters[-1] != " ":
                letters.append(" ")
                self.places.append(place)
        self.text = "".join(letters)

    def find(self, quote: str, what: str, within: Span | None = None) -> Span:
        """Where the quote stands, up to white space and case: as whole words if it does so anywhere, else the first.

        `within`: characters of the document to look in. Raises _RefusedError if it stands nowhere or holds no word.
        """
        words = " ".join(quote.lower().split())
        if not any(character.isalnum() for character in words):
            raise _RefusedError(f"{what} holds no word")
        first: Span | None = None
        low, high = within or (0, self.places[-1] + 1 if self.places else 0)
        # Only there, or an answer of common words would go through a long report for each of them.
        start = self.text.find(words, bisect_left(self.places, low))
        while start >= 0 and self.places[start] < high:
            end = start + len(words)
            found = (self.places[start], self.places[end - 1] + 1)
            if within is None or (within[0] <= found[0] and found[1] <= within[1]):
                cut = self.text[start - 1 : start + 1].isalnum() if start else False
                cut = cut or (end < len(self.text) and self.text[end - 1 : end + 1].isalnum())
                if not cut:
                    return found
                first = first or found
            start = self.text.find(words, start + 1)
        if first is None:
            raise _RefusedError(
                f"{what} does not stand in the report" if within is None else f"{what} is not in its context"
            )
        return first


def locate(answer: Answer, document: str, vocabulary: Vocabulary) -> Located:
    """The answer with spans in place of quotes. Raises _RefusedError naming the first member at fault by number."""
    folded = _Folded(document)
    entities = []
    for number, entity in enumerate(answer.entities):
        name = f"of entity {number}"
        if entity.concept not in vocabulary.concepts:
            raise _RefusedError(f"concept {name} is not in the list")
        context = folded.find(entity.context, f"context {name}")
        entities.append(
            LocatedEntity(
                concept=entity.concept,
                span=folded.find(entity.quote, f"quote {name}", context),
                context=context,
                status=entity.status,
                laterality=None if entity.laterality == "none" else entity.laterality,
                position=folded.find(entity.position, f"position {name}", context) if entity.position.strip() else None,
            )
        )
    anatomy: dict[str, LocatedAnatomy] = {}
    for number, part in enumerate(answer.anatomy):
        if part.anatomy not in vocabulary.anatomies:
            raise _RefusedError(f"anatomy {number} is not in the list")
        if part.anatomy in anatomy:
            raise _RefusedError(f"anatomy {number} stands twice")
        if not part.findings and not part.impression:
            raise _RefusedError(f"anatomy {number} has no sentence")
        anatomy[part.anatomy] = LocatedAnatomy(
            anatomy=part.anatomy,
            status=part.status,
            findings=_places(folded, part.findings, f"sentence of anatomy {number}"),
            impression=_places(folded, part.impression, f"sentence of anatomy {number}"),
        )
    # A model may name one place twice; the order of its lists says nothing.
    unique = {(entity.span, entity.concept): entity for entity in reversed(entities)}
    return Located(
        entities=tuple(unique[key] for key in sorted(unique)),
        anatomy=tuple(anatomy[name] for name in vocabulary.anatomies if name in anatomy),
    )


def _places(folded: _Folded, quotes: Sequence[str], what: str) -> tuple[Span, ...]:
    return tuple(sorted({folded.find(quote, what) for quote in quotes}))


# --- the question ---


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The closed lists that an answer may draw from."""

    concepts: tuple[str, ...]
    anatomies: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt file: its first line says `version: NAME N`, the rest is the text with `{concepts}`, `{anatomies}`."""

    version: str
    text: str

    @classmethod
    def read(cls, path: Path) -> Prompt:
        """Raises ConfigError for a file without version."""
        head, _, text = path.read_text("utf-8").partition("\n")
        if not head.startswith("version: ") or not text.strip():
            raise ConfigError(
                f"prompt {path.name}: the first line must be `version: NAME N`, the prompt comes after it"
            )
        return cls(version=head.removeprefix("version: ").strip(), text=text.strip())


@cache
def prompt() -> Prompt:
    """The prompt that is in use."""
    return Prompt.read(PROMPTS / "extract.md")


def answer_schema(vocabulary: Vocabulary) -> dict[str, Any]:
    """JSON schema of Answer, both lists as enumerations, in the subset that servers constrain answers to."""
    schema = Answer.model_json_schema()
    parts = schema["$defs"]
    parts["AnsweredEntity"]["properties"]["concept"]["enum"] = list(vocabulary.concepts)
    parts["AnsweredAnatomy"]["properties"]["anatomy"]["enum"] = list(vocabulary.anatomies)
    for part in (schema, *parts.values()):
        part.pop("description", None)
    return schema


def question(document: str, vocabulary: Vocabulary, json_schema: bool) -> list[dict[str, str]]:
    """The messages of a first call. The lines around the report hold its hash, so that it cannot hold them."""
    lists = {"{concepts}": ", ".join(vocabulary.concepts), "{anatomies}": ", ".join(vocabulary.anatomies)}
    system = re.sub(r"\{concepts\}|\{anatomies\}", lambda match: lists[match[0]], prompt().text)
    if not json_schema:
        system += f"\n\nThe JSON schema of the answer:\n{json.dumps(answer_schema(vocabulary))}"
    border = f"===== report {hashlib.sha256(document.encode()).hexdigest()[:16]} ====="
    return [{"role": "system", "content": system}, {"role": "user", "content": f"{border}\n{document}\n{border}"}]


def parse(content: str, json_schema: bool) -> Answer:
    """The answer in a message. Without `json_schema` words around the JSON are passed over, as small models add them.

    Raises _RefusedError.
    """
    try:
        if json_schema:
            body = json.loads(content)
        else:
            content = content.rpartition("</think>")[2]
            body, _ = json.JSONDecoder().raw_decode(content, max(content.find("{"), 0))
    except (ValueError, RecursionError):
        raise _RefusedError("no JSON") from None
    try:
        answer = Answer.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        known = {*Answer.model_fields, *AnsweredEntity.model_fields, *AnsweredAnatomy.model_fields}
        place = ".".join(str(part) if isinstance(part, int) or part in known else "?" for part in fault["loc"])
        raise _RefusedError(f"{fault['type']} at {place or 'its top'}") from None
    quotes = [len(part.findings) + len(part.impression) for part in answer.anatomy]
    if max(len(answer.entities), len(answer.anatomy), *quotes, 0) > LISTED_MAX:
        raise _RefusedError("too many members in a list")
    return answer


# --- the calls ---


@dataclass(frozen=True, kw_only=True)
class Read:
    """What became of one report: an answer, or the cause why there is none. Tokens count for cached answers, too."""

    located: Located | None
    cause: str | None = None
    cached: bool = False
    retries: tuple[str, ...] = ()
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(kw_only=True)
class Totals:
    """Sums over reports. `retries` and `failed` count by cause, in which the number of a member is left out."""

    answered: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, read: Read) -> None:
        """Count one report."""
        self.answered += read.located is not None
        self.cached += read.cached
        self.prompt_tokens += read.prompt_tokens
        self.answer_tokens += read.answer_tokens
        self.retries.update(map(_kind, read.retries))
        if read.cause is not None:
            self.failed[_kind(read.cause)] += 1

    def counts(self) -> dict[str, int]:
        """All of it by name, for an audit."""
        sums = {
            "answered": self.answered, "from the cache": self.cached, "prompt tokens": self.prompt_tokens,
            "answer tokens": self.answer_tokens,
        }  # fmt: skip
        sums |= {f"sent back: {reason}": count for reason, count in self.retries.items()}
        return sums | {f"left to rules: {cause}": count for cause, count in self.failed.items()}

    def cost(self, prompt_price: float, answer_price: float) -> float:
        """Money, at prices for a million tokens."""
        return (self.prompt_tokens * prompt_price + self.answer_tokens * answer_price) / 1e6


def _kind(reason: str) -> str:
    return re.sub(r"(?<=[ .])\d+(?=[ .]|$)", "N", reason)


class Reader:
    """Asks a model about reports; one object for each process."""

    def __init__(self, config: Config, vocabulary: Vocabulary, fingerprint: str | None) -> None:
        self.config, self.vocabulary = config, vocabulary
        self._cache = AnswerCache(folder=config.cache, fingerprint=fingerprint) if config.cache else None
        self._silent = 0  # reports in a row without any answer

    def probe(self) -> None:
        """One call about a report of our own, before any real one. Raises ConfigError or LLMUnreachableError."""
        try:
            refused = asyncio.run(self._probe()).refused or ""
        except _SilentError as silence:
            raise LLMUnreachableError(self._unreachable(silence)) from None
        if refused.startswith(REQUEST_REFUSED):
            raise ConfigError(
                f"--llm {self.config.url}: {refused}; does it have the model of --model, and JSON schemas? "
                "--llm-plain-json asks without them"
            )

    async def _probe(self) -> Answered:
        async with self._client() as client:
            return await self._converse(client, PROBE)

    def read(self, documents: Sequence[str], on_done: Callable[[Read], None] = lambda read: None) -> list[Read]:
        """What the model answers about each document, in their order; at most `concurrency` calls are under way.

        Raises ConfigError where the server refuses key or model, LLMUnreachableError where it is gone and
        `when_gone` is "stop".
        """
        return asyncio.run(self._read(documents, on_done)) if documents else []

    async def _read(self, documents: Sequence[str], on_done: Callable[[Read], None]) -> list[Read]:
        gate = asyncio.Semaphore(self.config.concurrency)
        async with self._client() as client:

            async def one(document: str) -> Read:
                async with gate:
                    read = await self._read_one(client, document)
                on_done(read)
                return read

            tasks = [asyncio.create_task(one(document)) for document in documents]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_one(self, client: openai.AsyncOpenAI, document: str) -> Read:
        config = self.config
        name, answered = "", None
        if self._cache is not None:
            mode = "schema" if config.json_schema else "plain"
            name = self._cache.name(prompt=prompt_name(), model=config.model, mode=mode, document=document)
            answered = self._cache.get(name)
            if answered is not None and (read := self._settled(answered, document, cached=True)) is not None:
                return read
        if self._silent >= SILENT_MAX:
            return Read(located=None, cause="server gone")
        try:
            answered = await self._converse(client, document)
        except _SilentError as silence:
            self._silent += 1
            if config.when_gone == "stop":
                raise LLMUnreachableError(self._unreachable(silence)) from None
            return Read(located=None, cause=str(silence))
        self._silent = 0
        # What the server refused today, for its size or for want of money, it may take tomorrow.
        if self._cache is not None and not (answered.refused or "").startswith(REQUEST_REFUSED):
            self._cache.put(name, answered)
        read = self._settled(answered, document, cached=False)
        assert read is not None, "an answer that was just checked"
        return read

    def _settled(self, answered: Answered, document: str, *, cached: bool) -> Read | None:
        """The answer checked; None for one that does not pass, which can only come from a cache that was changed."""
        try:
            located = None if answered.text is None else self._check(answered.text, document)
        except _RefusedError:
            return None
        return Read(
            located=located, cause=None if located else answered.refused, cached=cached, retries=answered.retries,
            prompt_tokens=answered.prompt_tokens, answer_tokens=answered.answer_tokens,
        )  # fmt: skip

    def _check(self, content: str, document: str) -> Located:
        return locate(parse(content, self.config.json_schema), document, self.vocabulary)

    async def _converse(self, client: openai.AsyncOpenAI, document: str) -> Answered:
        """Ask until an answer holds, at most `answers` times, each time with the reason against the one before."""
        messages = question(document, self.vocabulary, self.config.json_schema)
        reasons: list[str] = []
        prompt_tokens = answer_tokens = 0
        while True:
            try:
                completion = await self._call(client, messages)
            except _RefusedError as refusal:  # by the server; it would refuse the same request again
                return Answered(
                    text=None, refused=str(refusal), prompt_tokens=prompt_tokens, answer_tokens=answer_tokens,
                    retries=tuple(reasons),
                )  # fmt: skip
            prompt_tokens += _tokens(completion, "prompt_tokens")
            answer_tokens += _tokens(completion, "completion_tokens")
            content, reason = _content(completion)
            if reason is None:
                try:
                    self._check(content, document)
                except _RefusedError as refusal:
                    reason = str(refusal)
            if reason is None or len(reasons) == self.config.answers - 1:
                return Answered(
                    text=content if reason is None else None, refused=reason, prompt_tokens=prompt_tokens,
                    answer_tokens=answer_tokens, retries=tuple(reasons),
                )  # fmt: skip
            reasons.append(reason)
            messages = [
                *messages[:2],
                {"role": "assistant", "content": content or "(nothing)"},
                {
                    "role": "user",
                    "content": f"This answer is refused: {reason}. Give the whole JSON object again, mended.",
                },
            ]

    async def _call(self, client: openai.AsyncOpenAI, messages: list[dict[str, str]]) -> Any:
        """One chat completion. Silence, 429 and faults of the server are tried again with growing pauses.

        Raises _SilentError after all tries, _RefusedError for a request that the server does not take, ConfigError for
        a wrong key, model or address.
        """
        import openai
        from openai.types.chat import ChatCompletion

        arguments: dict[str, Any] = {"messages": messages}
        if self.config.json_schema:
            schema = {"name": "extraction", "strict": True, "schema": answer_schema(self.vocabulary)}
            arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
        silence = ""
        for attempt in range(self.config.tries):
            wait_s = 0.0
            try:
                async with asyncio.timeout(self.config.timeout_s):  # the client's own is for each byte
                    completion = await client.chat.completions.create(
                        model=self.config.model,
                        temperature=0.0,
                        max_tokens=self.config.answer_tokens,
                        **arguments,
                    )
                if isinstance(completion, ChatCompletion):
                    return completion
                silence = "no chat completion"
            except (TimeoutError, openai.APITimeoutError):
                silence = f"no answer within {self.config.timeout_s:g} s"
            except openai.APIConnectionError:
                silence = "no connection"
            except openai.APIStatusError as error:
                status = error.status_code
                if status in (401, 403, 404):
                    raise ConfigError(
                        f"--llm {self.config.url}: status {status}; is {API_KEY_VARIABLE} right, and the model of "
                        "--model there? The path of most servers ends in /v1"
                    ) from None
                if status < 500 and status not in (408, 409, 425, 429):
                    raise _RefusedError(f"{REQUEST_REFUSED} with status {status}") from None
                silence = f"status {status}"
                wait_s = _retry_after_s(error)
            except (openai.OpenAIError, ValueError, TypeError, AttributeError):
                silence = "no chat completion"  # of an answer that is HTTP, but not of this protocol
            if attempt + 1 < self.config.tries:
                pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**attempt) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause_s, min(wait_s, 2 * BACKOFF_MAX_S)))
        raise _SilentError(silence)

    def _unreachable(self, silence: _SilentError) -> str:
        return (
            f"--llm {self.config.url}: {silence}, {self.config.tries} times; start the server, or let rules take its "
            "place with --llm-gone rules. What was answered is kept in --llm-cache"
        )

    def _client(self) -> openai.AsyncOpenAI:
        import openai

        # At DEBUG they log requests, and with them reports.
        for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        return openai.AsyncOpenAI(
            base_url=self.config.url,
            api_key=os.environ.get(API_KEY_VARIABLE) or "none",
            max_retries=0,
            timeout=self.config.timeout_s,
            # Neither a proxy of the environment nor a redirect may carry text to another machine.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=self.config.allow_remote, follow_redirects=False),
        )


def prompt_name() -> str:
    """Version of the prompt with a hash of its text: one that was edited is another one."""
    return f"{prompt().version} {hashlib.sha256(prompt().text.encode()).hexdigest()[:8]}"


def _content(completion: Any) -> tuple[str, str | None]:
    """(text of the answer, why it is none)."""
    try:
        choice = completion.choices[0]
        content = choice.message.content or ""
        reason = choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        return "", "no choice in the answer"
    if not isinstance(content, str):
        return "", "no text in the answer"
    if reason == "length":
        return content, "cut off before its end"
    return content, None if content.strip() else "empty"


def _tokens(completion: Any, name: str) -> int:
    """A count of the usage; servers may leave it out, and the client checks no types."""
    count = getattr(completion.usage, name, 0)
    return count if isinstance(count, int) else 0


def _retry_after_s(error: openai.APIStatusError) -> float:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
