"""What the page says, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """All texts of the page in one language.

    Attributes:
        language: its code, as browsers name it.
        path: where the page in this language lies under the root.
        other: name of the other language, in that language.
        other_path: where the page in the other language lies, seen from this one.
    """

    language: str
    path: str
    other: str
    other_path: str
    new_chat: str
    chats: str
    no_chats: str
    delete: str
    delete_sure: str
    download: str
    upload: str
    ask: str
    ask_result: str
    hello: str
    tuned: str
    adapter: str
    base_alone: str
    strength: str
    strength_info: str
    compare: str
    base_answer: str
    system: str
    system_hint: str
    sampling: str
    keeps_defaults: str
    max_new_tokens: str
    max_new_tokens_info: str
    temperature: str
    temperature_info: str
    top_p: str
    top_k: str
    top_k_info: str
    repetition_penalty: str
    seed: str
    seed_info: str
    reset: str
    tools: str
    tools_info: str
    calls_tool: str
    cut: str
    switched_off: str
    stopped: str
    thoughts: str
    empty: str
    failed: str
    unreadable: str
    logout: str


ENGLISH = Words(
    language="en",
    path="",
    other="中文",
    other_path="./zh",
    new_chat="New chat",
    chats="Chats",
    no_chats="Kept in this browser only.",
    delete="Delete",
    delete_sure="Delete this chat?",
    download="Download",
    upload="Open file",
    ask="Ask something",
    ask_result="Result of {name}, as the tool would give it",
    hello="What would you like to know?",
    tuned="Tuning",
    adapter="Answer with",
    base_alone="the base model",
    strength="Strength of the prefix or LoRA",
    strength_info="1: as tuned, 0: without it",
    compare="Base beside it",
    base_answer="Base",
    system="System prompt",
    system_hint="What the model should know or be, in front of every chat",
    sampling="Sampling",
    keeps_defaults="Let the server decide",
    max_new_tokens="Longest answer",
    max_new_tokens_info="in tokens; 0: what the context leaves",
    temperature="Temperature",
    temperature_info="0: always the likeliest token",
    top_p="Top-p",
    top_k="Top-k",
    top_k_info="0: all tokens",
    repetition_penalty="Repetition penalty",
    seed="Seed",
    seed_info="empty: another answer each time",
    reset="As the release does",
    tools="Tools",
    tools_info="JSON list of descriptions. Calls are shown, never executed.",
    calls_tool="calls the tool {name} (shown, not executed)",
    cut="*— cut at the longest answer —*",
    switched_off="*— base —*",
    stopped="*— stopped —*",
    thoughts="*Thoughts*",
    empty="*(no text)*",
    failed="The answer failed",
    unreadable="The file could not be opened",
    logout="Log out",
)

CHINESE = Words(
    language="zh",
    path="zh",
    other="English",
    other_path="./?lang=en",
    new_chat="新对话",
    chats="对话",
    no_chats="仅保存在此浏览器中。",
    delete="删除",
    delete_sure="删除这个对话？",
    download="下载",
    upload="打开文件",
    ask="请输入问题",
    ask_result="请输入工具 {name} 的返回结果",
    hello="想聊点什么？",
    tuned="微调",
    adapter="回答使用",
    base_alone="基座模型",
    strength="前缀或 LoRA 的强度",
    strength_info="1：与训练时相同；0：不使用",
    compare="与基座并排对比",
    base_answer="基座",
    system="系统提示",
    system_hint="放在每个对话最前面，说明模型的身份或须知",
    sampling="采样参数",
    keeps_defaults="由服务器决定",
    max_new_tokens="最长回答",
    max_new_tokens_info="单位 token；0：上下文剩余长度",
    temperature="Temperature",
    temperature_info="0：总取概率最大的 token",
    top_p="Top-p",
    top_k="Top-k",
    top_k_info="0：不限制",
    repetition_penalty="重复惩罚",
    seed="随机种子",
    seed_info="留空：每次回答不同",
    reset="恢复模型默认值",
    tools="工具",
    tools_info="工具描述的 JSON 列表。调用只显示，绝不执行。",
    calls_tool="调用工具 {name}（仅显示，未执行）",
    cut="*— 已达最长回答，内容被截断 —*",
    switched_off="*— 基座 —*",
    stopped="*— 已停止 —*",
    thoughts="*思考过程*",
    empty="*（无内容）*",
    failed="回答失败",
    unreadable="无法打开文件",
    logout="退出登录",
)

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
