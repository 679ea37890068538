"""What runs in the browser: files are read and written there, so that none reaches the server as a file."""

from __future__ import annotations

SAVE_FILE = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "chat.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
"""Hand a text to the user as a file."""

OPEN_FILE = """(_, ...others) => new Promise((resolve) => {
  const input = document.createElement("input");
  input.type = "file";
  input.accept = ".json,application/json";
  const done = (text) => resolve([text, ...others]);
  input.addEventListener("cancel", () => done(""));
  input.addEventListener("change", async () => {
    const file = input.files[0];
    done(file && file.size <= 16 * 1024 * 1024 ? await file.text() : "too large");
  });
  input.click();
})"""
"""Let the user choose a file; its text takes the place of the first input."""

CONFIRM = """(sure, ...others) => [window.confirm(sure) ? "yes" : "", ...others]"""
"""Ask before something is lost: the first input is the question, and what comes of it."""

GIVE_BACK = """(typed, unanswered) => [typed || unanswered, ""]"""
"""Put a question that got no answer into the box, unless the next one is being typed there."""

ON_LOAD = """() => {
  document.documentElement.lang = "LANGUAGE";
  const question = document.querySelector("#question textarea");
  if (question && window.innerWidth >= 769) question.focus();
  // On a phone the side panel would cover the chat that one came for.
  if (window.innerWidth < 769) {
    const side = document.querySelector("#side");
    const opener = side && side.querySelector(".toggle-button");
    if (opener && side.classList.contains("open")) opener.click();
  }
}"""
"""When the page is there."""
