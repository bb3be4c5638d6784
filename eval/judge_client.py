"""One request to an OpenAI-compatible chat endpoint: settings, retries with backoff, errors in one line.

Source: the request and its fields, OpenAI's API reference, "Create chat completion"; temperature and length of the
judge, FastChat's llm_judge/common.py. Retries are urllib3's. The key comes from the environment and is written nowhere.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from lora_ga.errors import SetupError

TRANSIENT = (408, 429, *range(500, 600))  # asked again; any other error is the user's to fix
LONGEST_WAIT = 60.0  # seconds between two attempts
CONNECTS = 3  # a server that refuses the connection is rarely just busy

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Which judge, and how it is asked.

    `base_url` is what OpenAI's clients take: the address up to and with /v1. `name` stands in tables and file names
    (default: the model's). `prompts` is a file in FastChat's format (default: our own words). `trusted` says that its
    scores may stand beside published ones. `replay_only` reads recorded replies and refuses to send a request.
    """

    base_url: str
    model: str
    name: str | None = None
    repeats: int = 1
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    max_tokens: int = 2048  # FastChat, chat_completion_openai's call
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # OpenAI's newer models: the second
    temperature: float | None = 0.0  # FastChat; None: not sent, for models that refuse it
    prompts: str | None = None
    api_key_env: str | None = None
    trusted: bool = False
    replay_only: bool = False

    @property
    def judge_id(self) -> str:
        """The judge's name as it stands in file names."""
        return safe_name(self.name or self.model)

    def check(self) -> None:
        """Refuse, before anything is loaded or asked, what cannot work."""
        try:
            url = urlsplit(self.base_url)
        except ValueError as error:
            raise SetupError(f"judge.base_url is no address ({error}): use http://host:port/v1") from error
        # Not quoted: what is wrong with it may be a key.
        if "@" in url.netloc or url.query:
            raise SetupError(
                "judge.base_url carries a key or a query: name an environment variable in judge.api_key_env"
            )
        if url.scheme not in ("http", "https") or not url.netloc or url.path.rstrip("/").endswith("/chat/completions"):
            raise SetupError(f"judge.base_url={self.base_url} is no base address: use one like http://host:port/v1")
        for field, least in (("repeats", 1), ("concurrency", 1), ("max_tokens", 1), ("retries", 0)):
            if getattr(self, field) < least:
                raise SetupError(f"judge.{field}={getattr(self, field)} is too small: use {least} or more")
        if self.timeout <= 0 or self.backoff < 0:
            raise SetupError("judge.timeout must be positive and judge.backoff not negative: both are seconds")
        if self.api_key_env and not self.replay_only and not os.environ.get(self.api_key_env):
            raise SetupError(f"judge.api_key_env={self.api_key_env} is not set in the environment: export it")

    def body(self, messages: Messages) -> dict[str, Any]:
        """The request's JSON."""
        body: dict[str, Any] = {"model": self.model, "messages": [dict(message) for message in messages]}
        if self.temperature is not None:
            body["temperature"] = float(self.temperature)
        return body | {self.max_tokens_field: self.max_tokens}


@dataclass(frozen=True)
class Reply:
    """What the judge said: its text, the model id the server reports, and why it ended."""

    text: str
    model: str
    finish: str


def safe_name(text: str) -> str:
    """A file name for a model: the last part of a path, every other odd character an underscore."""
    if Path(text).is_absolute():
        text = Path(text).name
    return re.sub(r"[^\w.@+-]+", "_", text).strip("._") or "model"


class Client:
    """Sends requests to one judge from any number of threads, one connection each."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else ""
        self._local = threading.local()

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            retry = Retry(
                total=self._settings.retries,
                connect=min(CONNECTS, self._settings.retries),
                status_forcelist=TRANSIENT,
                allowed_methods=("POST",),
                backoff_factor=self._settings.backoff,
                backoff_max=LONGEST_WAIT,
                raise_on_status=False,
            )
            session = requests.Session()
            session.auth = self._authorise  # given so that requests does not send what ~/.netrc holds
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            self._local.session = session
        return self._local.session

    def reply(self, body: Mapping[str, Any]) -> Reply:
        """One reply; a busy, failing or silent server is asked again, and one whose 200 carries no completion.

        Errors: SetupError when the retries are used up or the server refuses.
        """
        problem = ""
        for attempt in range(self._settings.retries + 1):
            response = self._post(body)
            try:
                return _completion(response, str(body["model"]))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
                time.sleep(min(LONGEST_WAIT, self._settings.backoff * 2**attempt))
        raise SetupError(
            f"{self._url} answers 200 without a chat completion ({self._public(problem)}): check judge.base_url; "
            "replies so far are kept"
        )

    def _post(self, body: Mapping[str, Any]) -> requests.Response:
        try:
            response = self._session().post(self._url, json=body, timeout=self._settings.timeout)
        except requests.RequestException as error:
            raise SetupError(
                f"the judge at {self._url} does not answer ({self._public(str(error))}): start it, or raise "
                "judge.timeout or judge.retries; replies so far are kept"
            ) from None  # the chain is urllib3's, several screens of it
        if response.ok:
            return response
        reason = f"HTTP {response.status_code}: {self._public(response.text)}"
        if response.status_code in TRANSIENT:
            raise SetupError(
                f"the judge at {self._url} keeps failing ({reason}): run again later or lower judge.concurrency; "
                "replies so far are kept"
            )
        raise SetupError(
            f"the judge at {self._url} refuses ({reason}): check judge.base_url (it ends in /v1), judge.model, "
            "judge.max_tokens and judge.api_key_env; replies so far are kept"
        )

    def _public(self, text: str) -> str:
        """The start of a message on one line, without the key."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:200]


def _completion(response: requests.Response, requested: str) -> Reply:
    answer = response.json()
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str | None):
        raise TypeError(f"content is a {type(text).__name__}")
    # None is what a content filter leaves: a reply, and an unparsed one.
    return Reply(text or "", str(answer.get("model") or requested), str(choice.get("finish_reason")))
