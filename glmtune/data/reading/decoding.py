"""Turn the bytes of a text file into text: UTF-8 with or without BOM, GB18030, nothing else.

GB18030 because Chinese spreadsheets write it; no further guessing, because almost any bytes are valid in some
legacy encoding, and a model trained on wrong characters reports no error.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from glmtune.errors import DataError

_WIDE_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_COMMON_CHINESE_FRAC = (
    0.9  # of the non-ASCII characters; Latin-1 or Shift-JIS read as GB18030 stays far below
)
_SAMPLE_CHARACTERS = 200_000
"""Characters looked at to tell Chinese from chance; more would not change the share."""


@dataclass(frozen=True, slots=True)
class DecodedText:
    """Text and the encoding it was found in.

    Attributes:
        text: the text without byte order mark.
        encoding: ``utf-8``, ``utf-8 with BOM`` or ``gb18030``.
    """

    text: str
    encoding: str


def decode_text(raw: bytes, path: str) -> DecodedText:
    """Decode a data file.

    GB18030 is accepted when the bytes are no UTF-8 and the result reads as common Chinese; whoever asks warns
    of it, because a wrong guess would train on wrong characters.

    Args:
        raw: the whole file.
        path: the file, for messages.

    Returns:
        The text and its encoding.

    Raises:
        DataError: the file is empty, or in another encoding; the line of the first bad byte is named.
    """
    if not raw.strip(b"\xef\xbb\xbf \t\r\n"):
        raise DataError("the file is empty. A data file needs at least one row.", path=path)
    if raw.startswith(_WIDE_BOMS):
        raise _refusal("it starts with a UTF-16 or UTF-32 byte order mark", path, line=1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return DecodedText(_decode_chinese(raw, error, path), "gb18030")
    if text.startswith("\ufeff"):
        return DecodedText(text[1:], "utf-8 with BOM")
    return DecodedText(text, "utf-8")


def _decode_chinese(raw: bytes, error: UnicodeDecodeError, path: str) -> str:
    line = raw.count(b"\n", 0, error.start) + 1
    found = f"byte 0x{raw[error.start]:02x} at offset {error.start} is no UTF-8"
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        raise _refusal(f"{found}, and the file is no GB18030 either", path, line) from None
    foreign = [character for character in text[:_SAMPLE_CHARACTERS] if character > "\x7f"]
    common = len("".join(foreign).encode("gb2312", "ignore")) / 2
    if not foreign or common < _COMMON_CHINESE_FRAC * len(foreign):
        raise _refusal(f"{found}, and read as GB18030 it is no common Chinese", path, line)
    return text


def _refusal(found: str, path: str, line: int) -> DataError:
    return DataError(
        f"unknown text encoding: {found}. Files must be UTF-8 (with or without BOM) or GB18030. Convert it,"
        " for instance with `iconv -f <its encoding> -t UTF-8 OLD > NEW`.",
        path=path,
        line=line,
    )
