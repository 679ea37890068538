"""What ChatGLM-6B derives from its inputs: where the context ends, positions of every token, and masks.

A row is context, a mask token (gMASK or MASK, which may stand inside the context), sop, answer. gMASK asks
for a text behind the context (every chat prompt ends with it), MASK for what is missing in the middle of
one.

Only the ids tell where the context ends. So positions and masks are made here, from whole rows, rather than
by the tokenizer: a prompt from any source then gets what the model was trained with.

Shapes: B rows, S tokens, T position streams (1 or 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmtune.errors import DataError, ShapeError
from glmtune.models.architectures.chatglm_config import ChatGlmConfig


def context_lengths(input_ids: Tensor, config: ChatGlmConfig) -> Tensor:
    """Find the first sop of every row; the tokens before it, padding included, are the context.

    Args:
        input_ids: int64 ``[B, S]``.
        config: names the token.

    Returns:
        int64 ``[B]``.

    Raises:
        DataError: a row has no sop.
    """
    return _first(input_ids == config.bos_token_id, f"sop ({config.bos_token_id})")


def context_blocks(input_ids: Tensor | None, config: ChatGlmConfig) -> Tensor:
    """Say which tokens see each other in both directions: those of the context; all others look back only.

    Args:
        input_ids: int64 ``[B, S]``, whole rows.
        config: names the sop token.

    Returns:
        int64 ``[B, S]``, 0 in the context and −1 from sop on, as `create_causal_mask` takes it.

    Raises:
        DataError: a row has no sop.
        ShapeError: there are no ids.
    """
    if input_ids is None:
        raise ShapeError(
            "Only input_ids tell where the context ends: with inputs_embeds, attention_mask must have "
            "the official form [batch, 1, length, length], True = blocked."
        )
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (column[None] < context_lengths(input_ids, config)[:, None]).long() - 1


def shared_context(input_ids: Tensor, attention_mask: Tensor | None, config: ChatGlmConfig) -> int | None:
    """Return the length of the context where every row has the same one and nothing is padding, else None.

    Args:
        input_ids: int64 ``[B, S]``, whole rows.
        attention_mask: ``[B, S]``, nonzero = real; None: all are.
        config: names the sop token.

    Raises:
        DataError: a row has no sop.
    """
    if torch.compiler.is_compiling():  # the answer would have to leave the compiled graph
        return None
    # Padding stands in front, inside what would be the context, and must be hidden from it: needs a real
    # mask.
    if attention_mask is not None and not bool((attention_mask != 0).all()):
        return None
    lengths_B = context_lengths(input_ids, config)
    first = int(lengths_B[0])
    return first if first > 0 and bool((lengths_B == first).all()) else None


def token_positions(input_ids: Tensor, config: ChatGlmConfig, attention_mask: Tensor | None = None) -> Tensor:
    """Number the tokens of whole rows, as the final release does.

    The first stream counts the real tokens of the context and stands still at the mask token's number from
    sop on (gMASK's if the row has one, otherwise MASK's). The second is 0 in the context and counts from 1 at
    sop. With one stream (`position_encoding_2d` false) it never stands still under gMASK.

    Args:
        input_ids: int64 ``[B, S]``, from the first token on.
        config: token ids and rules.
        attention_mask: ``[B, S]``, nonzero = real; None: all are.

    Returns:
        int64 ``[B, T, S]``; 0 on padding in front.

    Raises:
        DataError: a row has no sop, or neither gMASK nor MASK.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    count = (real.cumsum(-1) - 1).clamp(min=0)
    sop = context_lengths(input_ids, config)[:, None]
    column = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    gmask, mask = input_ids == config.gmask_token_id, input_ids == config.mask_token_id
    has_gmask = gmask.any(-1, keepdim=True)
    what = f"gMASK ({config.gmask_token_id}) and no MASK ({config.mask_token_id})"
    place = count.gather(1, _first(torch.where(has_gmask, gmask, mask), what)[:, None])
    if not config.position_encoding_2d:
        return torch.where((column >= sop) & ~has_gmask, place, count)[:, None]
    # The first checkpoints (March 2023) were run by code that numbered the prompt, sop included, straight on
    # under gMASK, and stood still only from the first generated token; their weights expect it.
    stands_still = column >= sop
    if config.position_rule == "march_2023":
        stands_still &= (column > sop) | ~has_gmask
    return torch.stack((torch.where(stands_still, place, count), (column - sop + 1).clamp(min=0)), dim=1)


def continue_positions(position_ids: Tensor, input_ids: Tensor, config: ChatGlmConfig) -> Tensor:
    """Number the tokens that follow given ones.

    Args:
        position_ids: int64 ``[B, T, S]`` (``[B, S]`` where T is 1), up to sop or beyond.
        input_ids: int64 ``[B, length]``, the tokens so far, at least S.
        config: decides whether the first stream stands still.

    Returns:
        int64 ``[B, T, length]``.
    """
    given = position_streams(position_ids, config)
    num_given, length = given.shape[-1], input_ids.shape[1]
    steps = torch.arange(1, length - num_given + 1, device=given.device)
    following = given[..., -1:] + steps
    # Where the first stream stands still, it does so at the mask token's number. That need not be the last
    # one given: in March 2023 sop, the last token of a prompt, was counted on.
    known = input_ids[:, :num_given]
    gmask, mask = known == config.gmask_token_id, known == config.mask_token_id
    has_gmask = gmask.any(-1, keepdim=True)
    at_mask = torch.where(has_gmask, gmask, mask)
    place = given[:, 0].gather(1, at_mask.long().argmax(-1, keepdim=True))
    place = torch.where(at_mask.any(-1, keepdim=True), place, given[:, 0, -1:])
    stands_still = (
        torch.ones_like(has_gmask) if config.position_encoding_2d else mask.any(-1, keepdim=True) & ~has_gmask
    )
    following[:, 0] = torch.where(stands_still, place, following[:, 0])
    return torch.cat((given, following), dim=-1)


def position_streams(position_ids: Tensor, config: ChatGlmConfig) -> Tensor:
    """Check positions and bring them into the form ``[B, T, S]``.

    Raises:
        ShapeError: there are more or fewer streams than the model has.
    """
    streams = config.num_position_streams
    shaped = position_ids[:, None] if position_ids.dim() == 2 else position_ids
    if shaped.dim() != 3 or shaped.shape[1] != streams:
        raise ShapeError(
            f"position_ids is {list(position_ids.shape)}, but this ChatGLM-6B takes {streams} numbers per "
            f"token: [batch, {streams}, length]. Leave them out, and the model derives them from input_ids; "
            "packed rows, which mark their samples by positions, do not exist in this generation."
        )
    return shaped


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Reduce the official mask to ``[B, S]``, 1 = real: the last token sees all but padding."""
    if attention_mask is None or attention_mask.dim() != 4:
        return attention_mask
    return attention_mask[:, 0, -1].logical_not().long()


def answer_mask(context_length: int, hidden_BSD: Tensor) -> Tensor | None:
    """Let the tokens from sop on look back.

    Args:
        context_length: of every row, c.
        hidden_BSD: tells length and device.

    Returns:
        Boolean ``[1, 1, S - c, S]``, True = visible; None where sop stands alone and sees all.
    """
    num_tokens = hidden_BSD.shape[1]
    if num_tokens == context_length + 1:
        return None
    size = (num_tokens - context_length, num_tokens)
    return torch.ones(size, dtype=torch.bool, device=hidden_BSD.device).tril(context_length)[None, None]


def additive_mask(mask_B1QK: Tensor, hidden_BSD: Tensor) -> Tensor:
    """Turn a four-dimensional mask into what is added to the scores.

    Args:
        mask_B1QK: boolean in the official meaning (True = blocked, the opposite of PyTorch's), or additive.
        hidden_BSD: tells length, dtype and device.

    Returns:
        ``[B, 1, S, K]``, 0 where a key is visible. Blocked keys get the lowest finite number rather than
        minus infinity, so that a row which sees nothing (padding) has weights instead of NaN.

    Raises:
        ShapeError: the mask is of an integer type.
    """
    # A mask of the whole text may come along with its last tokens alone: the last rows are theirs.
    mask_B1QK = mask_B1QK[:, :, -hidden_BSD.shape[1] :].to(hidden_BSD.device)
    if mask_B1QK.is_floating_point():
        return mask_B1QK.to(hidden_BSD.dtype)
    if mask_B1QK.dtype != torch.bool:
        raise ShapeError(
            "A four-dimensional attention_mask must be boolean (True = blocked) or floating point (added to "
            f"the scores), but this one is {mask_B1QK.dtype}. Convert it, or pass a [batch, length] mask, "
            "1 = real."
        )
    blocked = torch.finfo(hidden_BSD.dtype).min
    return torch.zeros_like(mask_B1QK, dtype=hidden_BSD.dtype).masked_fill(mask_B1QK, blocked)


def _first(found_BS: Tensor, what: str) -> Tensor:
    """Column of the first hit in every row."""
    if not torch.compiler.is_compiling() and not bool(found_BS.any(-1).all()):
        row = int(found_BS.any(-1).logical_not().nonzero()[0])
        raise DataError(
            f"Row {row} of input_ids has no {what}, but ChatGLM-6B reads every row as context, gMASK or "
            "MASK, sop, answer. Encode it with the model's tokenizer, special tokens included, or pass "
            "attention_mask and position_ids in their official forms."
        )
    return found_BS.long().argmax(-1)
