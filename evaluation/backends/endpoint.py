"""Where a server is and how it is asked: the settings alone, as the command line needs them at once."""

from __future__ import annotations

from dataclasses import dataclass

from glmtune.http_client.server_address import read_address
from glmtune.settings import check_range, setting


@dataclass(frozen=True)
class EndpointSettings:
    """A server with OpenAI's interface."""

    base_url: str = setting("http://localhost:8000/v1", "address up to and with /v1")
    model: str = setting(
        "", "model name as the server knows it; empty: the first it lists (not every server has a list)"
    )
    is_chat: bool = setting(True, "questions as conversations (chat/completions) or as text (completions)")
    max_context_tokens: int | None = setting(
        None, "longest prompt and completion; default: what the server says (max_model_len)"
    )
    api_key_env: str = setting("OPENAI_API_KEY", "environment variable that holds the key, if one is needed")
    top_logprobs: int = setting(20, "likeliest next tokens asked for to score choices; OpenAI allows text 5")
    concurrency: int = setting(16, "requests under way at once")
    timeout_seconds: float = setting(600.0, "per request")
    max_retries: int = setting(8, "further attempts while the server is busy or out of reach")
    first_wait_seconds: float = setting(1.0, "pause before the first further attempt; it doubles each time")
    max_failed_questions: int = setting(
        50, "questions that may fail for good; they are not scored, and asked again by the same command"
    )
    server_name: str | None = setting(
        None, "whom answers are kept of, for a server that moves; default: its address"
    )

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a number is out of range, or the address is none.
        """
        check_range("endpoint.concurrency", self.concurrency, low=1)
        check_range("endpoint.top_logprobs", self.top_logprobs, low=1)
        check_range("endpoint.max_retries", self.max_retries, low=0)
        check_range("endpoint.timeout_seconds", self.timeout_seconds, low=0.001)
        check_range("endpoint.first_wait_seconds", self.first_wait_seconds, low=0)
        check_range("endpoint.max_failed_questions", self.max_failed_questions, low=0)
        read_address(self.base_url)
