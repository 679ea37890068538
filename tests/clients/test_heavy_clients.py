"""langchain-openai and litellm, in a Python of their own (see `clients_python`)."""

from __future__ import annotations

import json

from tests.clients.conftest import run_python

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="glm-tiny", temperature=0, max_retries=0)
question = "12+30等于多少？"
whole = chat.invoke(question)
stream = "".join(piece.content for piece in chat.stream(question))
print(json.dumps({"whole": whole.content, "stream": stream, "usage": whole.usage_metadata}))
"""
LITELLM = """
import json, sys
import litellm
asked = dict(model="openai/glm-tiny", api_base=sys.argv[1] + "/v1", api_key="none", temperature=0,
             messages=[{"role": "user", "content": "12+30等于多少？"}], num_retries=0)
whole = litellm.completion(**asked)
pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(stream=True, **asked)]
print(json.dumps({"whole": whole.choices[0].message.content, "stream": "".join(pieces),
                  "usage": {"total_tokens": whole.usage.total_tokens}}))
"""


def assert_asked(python: str, script: str, served: str) -> None:
    said = json.loads(run_python(python, script, served).splitlines()[-1])
    assert "42" in said["whole"]
    assert said["stream"] == said["whole"]
    assert said["usage"]["total_tokens"] > 10


def test_langchain(served: str, clients_python: str) -> None:
    assert_asked(clients_python, LANGCHAIN, served)


def test_litellm(served: str, clients_python: str) -> None:
    assert_asked(clients_python, LITELLM, served)
