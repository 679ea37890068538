"""The official client for Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = """
import { createRequire } from "node:module";
const OpenAI = createRequire(process.env.MODULES + "/")("openai").OpenAI;
const client = new OpenAI({ baseURL: process.env.SERVED + "/v1", apiKey: "none", maxRetries: 0 });
const asked = { model: "glm-tiny", temperature: 0, messages: [{ role: "user", content: "12+30等于多少？" }] };
const whole = await client.chat.completions.create(asked);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
let status = 0;
try { await client.chat.completions.create({ ...asked, model: "none" }); } catch (error) { status = error.status; }
console.log(JSON.stringify({ whole: whole.choices[0].message.content, text, status }));
"""


@pytest.fixture
def modules() -> str:
    found = os.environ.get("GLMTUNE_NODE_MODULES")
    if not found or not shutil.which("node"):
        pytest.skip("GLMTUNE_NODE_MODULES names no folder with npm's `openai`, or there is no node")
    return found


def test_chat_stream_and_error(served: str, modules: str, tmp_path: Path) -> None:
    script = tmp_path / "client.mjs"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "SERVED": served, "MODULES": modules}
    done = subprocess.run(
        ["node", str(script)], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "42" in said["whole"]
    assert said["text"] == said["whole"]
    assert said["status"] == 404
