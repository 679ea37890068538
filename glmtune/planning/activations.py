"""What autograd keeps from the forward pass, and what the head and one block need for a moment.

Letters: B rows, S tokens of a row, n = B x S, T labels, D hidden width, F width inside the MLP, N query
heads, K key/value heads, H width of a head, P prefix length, V vocabulary, C labels whose logits are formed
at once; c bytes of a product's result, r bytes of a number of the residual stream.

Autograd keeps an operation's inputs or outputs only where a gradient needs them: a frozen linear layer keeps
nothing (its input's gradient needs the weight alone), a trained one keeps its input. The formulas follow,
operation by operation, transformers' GLM block and `glmtune.models.architectures.chatglm`; `tests/planning`
holds them to the byte against the tensors that autograd saves.

Sources:
    Korthikanti et al. 2022, arXiv:2205.05198, section 4 (the method of counting; their block is another one);
    Chen et al. 2016, arXiv:1604.06174 (checkpointing); Dao et al. 2022, arXiv:2205.14135 (fused attention
    keeps one number per query instead of all weights).
"""

from __future__ import annotations

from glmtune.planning.geometry import Latent
from glmtune.planning.workload import Workload

# Some constants of other modules, repeated because importing those means importing torch, which takes
# longer than the whole plan; `tests/planning` measures what is really kept.
HEAD_ROWS = 256
"""On a CPU the head is given a multiple of so many rows (`glmtune.models.architectures.chunked_loss`)."""
LOGITS_PER_CHUNK = 2**26
"""Logits formed at once (same place)."""
DECODED_ROWS = 512
"""Outputs whose weights are formed from codes at once on a CPU (`glmtune.quantization.layers.linear`)."""
DECODED_WHOLE, DECODED_PIECE = 2**15, 2**13
"""On others: up to so many outputs at once, wider layers in such pieces (same place)."""
SHARED_INPUT = ("q_proj", "k_proj", "v_proj")
"""Layers of a block that read one tensor."""
FROM_BELOW = (*SHARED_INPUT, "query_key_value", "q_a_proj", "kv_a_proj_with_mqa")
"""Layers that read what comes from below the block; below the lowest one nothing is trained."""
WIDENS = {"q_b_proj": "q_a_proj", "kv_b_proj": "kv_a_proj_with_mqa"}
"""Layers that read what another one made of what comes from below."""


def block_bytes(work: Workload, *, is_lowest: bool = False, is_dense: bool = False) -> float:
    """Return the bytes kept inside one block, its input included.

    Args:
        work: of the run.
        is_lowest: the first block; below it nothing is trained unless every weight is, so that its first norm
            and what comes before the attention keep nothing.
        is_dense: one of the blocks of a mixture that have a plain MLP.
    """
    mixture = work.geometry.mixture
    is_dense = is_dense or mixture is None or (is_lowest and mixture.num_dense > 0)
    kept = mlp_bytes(work) if is_dense else expert_bytes(work)
    kept += 2 * norm_bytes(work) + linear_input_bytes(work)
    kept += attention_bytes(work, is_lowest=is_lowest) + lora_bytes(work, is_lowest=is_lowest)
    # LoRA rotates queries that need a gradient, the lowest prefix none.
    if is_lowest and work.tune == "prefix":
        kept -= rotary_bytes(work)
    return kept - norm_bytes(work) if is_lowest and not work.is_full else kept


def checkpoint_bytes(work: Workload) -> float:
    """Return what a checkpointed block keeps: its input, ``r n D``."""
    return work.residual_bytes * work.batch.num_tokens * work.geometry.hidden_size


def norm_bytes(work: Workload) -> float:
    """Return the bytes kept by a norm.

    RMSNorm squares its input in float32 (kept: ``4 n D``, for a float32 stream the stream itself), keeps the
    inverse root (``4 n``) and, if its weight is trained, the normalised input in the stream's type (``r n
    D``). LayerNorm (first generation; in float32 under autocast) keeps its input (``r n D``), mean and
    inverse deviation (``4 n`` each).
    """
    tokens, width = work.batch.num_tokens, work.geometry.hidden_size
    if work.geometry.is_first:
        return tokens * (work.residual_bytes * width + 2 * 4)
    return tokens * (4 * width + 4 + (work.residual_bytes * width if work.is_full else 0))


def attention_bytes(work: Workload, *, is_lowest: bool = False) -> float:
    """Return the bytes kept by the attention itself, projections apart.

    Fused attention keeps queries and output ``c B N H Q`` each, keys and values ``c B M H (P + S)`` each, one
    float32 per query, and its mask ``c B S (P + S)`` where rows are padded. With a mask keys and values are
    repeated for all heads (M = N) and Q = S; without one M = K, and P blank queries stand in front of the
    others (`glmtune.prefix.attention`), Q = P + S. In the first generation M = N; without a prefix its
    values are a view into the fused projection, which is kept whole (3 N); an unpadded batch runs as
    context and answer, each with a prefix of its own (under autocast the context's keys are cast for
    themselves).

    Eager attention keeps queries, repeated keys and values, and the weights ``B N S (P + S)`` in float32
    and, if that is not float32, in the type of the products.

    A gated prefix stands before no tokens: it adds `gated_bytes`, and in the lowest block, where nothing that
    is trained enters the tokens' own attention, that keeps nothing.
    """
    if work.geometry.latent is not None:
        return _latent_bytes(work, work.geometry.latent, is_lowest=is_lowest)
    if work.is_gated:
        below = rotary_bytes(work) if is_lowest else _softmax_bytes(work, prefix_length=0)
        return below + gated_bytes(work, is_lowest=is_lowest)
    return _softmax_bytes(work, prefix_length=work.prefix_length)


def _softmax_bytes(work: Workload, *, prefix_length: int) -> float:
    geometry, batch, size = work.geometry, work.batch, work.compute_bytes
    rows, length, keys = batch.rows, batch.length, prefix_length + batch.length
    heads, width = geometry.num_heads, geometry.head_dim
    if work.attention == "eager":
        weights = rows * heads * length * keys * (4 + (size if size != 4 else 0))
        return size * rows * heads * width * (length + 2 * keys) + weights + rotary_bytes(work)
    is_masked = batch.is_padded
    queries = length if is_masked or geometry.is_first else keys
    shared = heads if is_masked or geometry.is_first else geometry.num_kv_heads
    numbers = 2 * heads * queries + 2 * shared * keys
    mask = rows * length * keys if is_masked else 0
    if geometry.is_first and not prefix_length:
        numbers += 2 * heads * length
    if geometry.is_first and not is_masked:
        answer = batch.num_labels // rows + 1
        mask = answer * keys
        numbers += (2 if prefix_length else work.autocast) * heads * (keys - answer)
    kept = size * (rows * width * numbers + mask) + 4 * rows * heads * queries + rotary_bytes(work)
    if geometry.qk_norm:  # in float32 the norm's input and inverse root, of queries and of keys
        kept += 4 * rows * length * (heads + geometry.num_kv_heads) * (width + 1)
    return kept


def _latent_bytes(work: Workload, latent: Latent, *, is_lowest: bool) -> float:
    """Return the bytes kept by attention widened from a few numbers, projections apart.

    The norms of what queries, and keys and values, are widened from: input and inverse root, in float32; in
    float32 the former is a view into the projection, which is kept whole. In the lowest block only what LoRA
    adapts below them needs these. Values have another width than keys, which no fused attention of a CPU
    takes: it computes in float32 and keeps the weights ``4 B N S S``; a GPU's does.
    """
    geometry, batch, size = work.geometry, work.batch, work.compute_bytes
    tokens, heads = batch.num_tokens, batch.rows * geometry.num_heads
    adapted, is_wide = work.lora_targets, work.residual_bytes == 4
    kept = 0.0
    if latent.query_rank is not None and ("q_a_proj" in adapted or not is_lowest):
        kept += 4 * tokens * (latent.query_rank + 1)
    if "kv_a_proj_with_mqa" in adapted or not is_lowest:
        kept += 4 * tokens * (latent.rank + (latent.rotary_dim if is_wide else 0) + 1)
    key = latent.plain_dim + latent.rotary_dim
    if work.device == "cpu" or work.attention == "eager":
        kept += 4 * heads * batch.length * (2 * key + latent.value_dim + batch.length)
    else:
        kept += size * heads * batch.length * 2 * (key + latent.value_dim) + 4 * heads * batch.length
        kept += size * batch.rows * batch.length**2 if batch.is_padded else 0
    return kept


def gated_bytes(work: Workload, *, is_lowest: bool = False) -> float:
    """Return the bytes kept by attention over a gated prefix and by its gate.

    The output ``c B N H S``, one float32 per query, keys and values ``c B K H P`` each, and the gate. Queries
    are kept by the attention over tokens, but for the lowest block, where that keeps nothing.
    """
    assert work.prefix is not None
    geometry, batch, size = work.geometry, work.batch, work.compute_bytes
    heads, length = batch.rows * geometry.num_heads, work.prefix_length
    outputs = size * heads * geometry.head_dim * batch.length * (2 if is_lowest else 1)
    if work.attention == "eager":  # repeated keys and values, and the weights
        states = 2 * size * heads * geometry.head_dim * length
        sums = heads * batch.length * length * (4 + (size if size != 4 else 0))
    else:
        states = 2 * size * batch.rows * geometry.num_kv_heads * geometry.head_dim * length
        sums = 4 * heads * batch.length
    gates = geometry.num_heads * (4 + (size if size != 4 else 0))
    return outputs + states + sums + gates


def rotary_bytes(work: Workload) -> float:
    """Return the bytes of cosine and sine for half a head, spread out anew in every block: ``r S H``.

    In the first generation, and in mixtures of experts, all blocks share them.
    """
    is_shared = work.geometry.is_first or work.geometry.mixture is not None
    return 0 if is_shared else work.residual_bytes * work.batch.length * work.geometry.head_dim


def mlp_bytes(work: Workload) -> float:
    """Return the bytes kept inside the MLP.

    SwiGLU: the projection to gate and up (``2 F``) and the activated gate (``F``). GELU: its input (``F``).
    """
    inner = work.geometry.mlp_size * (1 if work.geometry.is_first else 3)
    return work.compute_bytes * work.batch.num_tokens * inner


def expert_bytes(work: Workload) -> float:
    """Return the bytes kept by a mixture of experts in place of the MLP.

    Of a token and an expert that it was given to: gate and up, the activated gate (``3 F'``) and the result
    (``D``), which waits for the gradient of its float32 weight, beside three indices. Of a token: what the
    MLP beside them keeps, and of the router the float32 scores and mask of all experts, weights and indices
    of the chosen ones and of their groups. The experts' common product (``grouped_mm``) keeps their ends.

    Source: `transformers.models.glm4_moe`, `transformers.integrations.moe`.
    """
    geometry, tokens, size = work.geometry, work.batch.num_tokens, work.compute_bytes
    mixture = geometry.mixture
    assert mixture is not None
    chosen = mixture.num_chosen
    given = size * (3 * mixture.expert_size + geometry.hidden_size) + 4 + 3 * 8
    router = 5 * mixture.num_experts + 16 * mixture.num_groups + 8 * mixture.num_chosen_groups
    router += 8 * chosen + 4 + 4 * chosen
    return tokens * (chosen * given + 3 * size * mixture.shared_size + router) + 4 * mixture.num_experts


def linear_input_bytes(work: Workload) -> float:
    """Return the bytes of inputs that trained linear layers keep for the gradient of their weights.

    Queries, keys and values read one tensor, but under autocast each casts it for itself. In the first
    generation the output of one fused attention (padded rows) is laid out as the next layer reads it: no
    second tensor.
    """
    if not work.is_full:
        return 0.0
    linears = work.geometry.linears
    laid_out = ("dense",) if work.batch.is_padded and work.attention == "sdpa" else ()
    widths = [columns for name, (_, columns) in linears.items() if name not in (*SHARED_INPUT, *laid_out)]
    if not work.geometry.is_first:
        widths += [work.geometry.hidden_size] * (3 if work.autocast else 1)
    return work.compute_bytes * work.batch.num_tokens * sum(widths)


def lora_bytes(work: Workload, *, is_lowest: bool = False) -> float:
    """Return the bytes that adapters of one block keep.

    An adapter computes in float32 (under autocast in 16 bits): it keeps its dropped-out input ``[n, I]``, the
    result of its first matrix ``[n, rank]``, and the dropout's mask: ``4 n I`` on a CPU, ``n I`` on a GPU,
    none where the input needs no gradient.
    """
    if work.lora is None:
        return 0.0
    tokens, size = work.batch.num_tokens, 2 if work.autocast else 4
    kept = 0.0
    for name, (_, columns) in work.lora_targets.items():
        kept += size * tokens * (columns + work.lora.rank)
        is_untrained_below = name in FROM_BELOW or WIDENS.get(name, name) not in work.lora_targets
        if work.lora.dropout > 0 and not (is_lowest and is_untrained_below):
            kept += (4 if work.device == "cpu" else 1) * tokens * columns
    return kept


def prefix_bytes(work: Workload) -> float:
    """Return what the prefix encoder keeps: the mask of its dropout, which falls on every row of a batch.

    The mask has the type of the keys on a CPU and is one byte per number on a GPU. A projection keeps the
    rows that enter it and its activation, in float32.
    """
    prefix, geometry = work.prefix, work.geometry
    if prefix is None:
        return 0.0
    width = geometry.num_layers * 2 * geometry.num_kv_heads * geometry.head_dim
    per_number = work.weight_bytes if work.device == "cpu" else 1
    kept = work.batch.rows * prefix.pre_seq_len * width * per_number if prefix.dropout > 0 else 0.0
    if prefix.prefix_projection:
        inner = geometry.hidden_size if geometry.is_first else width
        kept += 4 * prefix.pre_seq_len * (inner + geometry.hidden_size)
    return kept


def prefix_states_bytes(work: Workload) -> float:
    """Return the prefix of all layers, alive while checkpointed blocks may need it again."""
    prefix, geometry = work.prefix, work.geometry
    if prefix is None:
        return 0.0
    rows = work.batch.rows if prefix.dropout > 0 else 1
    width = geometry.num_layers * 2 * geometry.num_kv_heads * geometry.head_dim
    return rows * prefix.pre_seq_len * width * work.weight_bytes


def chunk_labels(work: Workload) -> int:
    """Return C, the labels whose logits exist at the same time."""
    most = max(HEAD_ROWS, LOGITS_PER_CHUNK // work.geometry.vocab_size)
    return min(work.batch.num_labels, most)


def logits_bytes(work: Workload) -> float:
    """Return the memory of logits and their gradient at its largest.

    The loss keeps the log-softmax (float32); its backward pass adds the gradient of that and of the logits:
    three times ``4 C V``. On a CPU the head computes whole multiples of 256 rows, so that few labels need
    ``4 (C' + C) V`` at the end of the backward pass, or while logits and log-softmax are formed.
    """
    labels, vocab = chunk_labels(work), work.geometry.vocab_size
    return max(12 * labels, 4 * (_head_rows(work, labels) + labels)) * vocab


def _head_rows(work: Workload, labels: int) -> int:
    return -(-labels // HEAD_ROWS) * HEAD_ROWS if work.device == "cpu" else labels


def head_bytes(work: Workload) -> float:
    """Return what final norm and head keep: the norm, and if the head is trained its input at the labels."""
    kept = norm_bytes(work)
    if work.is_full:
        kept += work.compute_bytes * work.batch.num_labels * work.geometry.hidden_size
    return kept


def block_moment_bytes(work: Workload) -> float:
    """Return the activations that the backward pass of one block needs at its largest, beside what was kept.

    In the MLP: the gradients of down's input, of the activated gate and of up (``3 F``; with one half
    ``2 F``) and two of the residual stream. By then a trained layer has used its input (``F``), which is
    free.
    """
    geometry, tokens = work.geometry, work.batch.num_tokens
    inner = geometry.mlp_size * ((2 if geometry.is_first else 3) - work.is_full)
    if geometry.mixture is not None:  # of every chosen expert: its result's gradients and those inside
        experts = geometry.mixture.num_chosen * (2 * geometry.hidden_size + 3 * geometry.mixture.expert_size)
        inner = max(inner, experts)
    return tokens * (work.compute_bytes * inner + 2 * work.residual_bytes * geometry.hidden_size)


def decoded_bytes(work: Workload) -> float:
    """Return the widest weight of a quantized base while it is formed from codes, in either pass.

    The codes as bytes, in float32, and in the type of the products; on a CPU those of some outputs at a time.
    """
    if work.method is None:
        return 0.0
    return _formed_bytes(work, *work.geometry.linears.values())


def decoded_head_bytes(work: Workload, *, is_training: bool = True) -> float:
    """Return what forming the weight of a head of codes needs beyond the memory of logits.

    The weight is formed when not all of that is there: in the forward pass beside the head's result, in the
    backward pass beside the gradient of the logits in float32 and in the type of the products.

    Args:
        work: of the run.
        is_training: with a backward pass; else beside `evaluation_bytes`.
    """
    if work.embeddings is None:
        return 0.0
    vocab, labels = work.geometry.vocab_size, chunk_labels(work)
    formed = _formed_bytes(work, (vocab, work.geometry.hidden_size))
    if not is_training:
        labels, logits = _eval_labels(work), evaluation_bytes(work)[1]
        return max(0.0, formed + work.compute_bytes * _head_rows(work, labels) * vocab - logits)
    beside = (4 * labels + work.compute_bytes * _head_rows(work, labels)) * vocab
    return max(0.0, formed + beside - logits_bytes(work))


def _formed_bytes(work: Workload, *shapes: tuple[int, int]) -> float:
    def at_once(rows: int) -> int:
        if work.device == "cpu":
            return min(rows, DECODED_ROWS)
        return rows if rows <= DECODED_WHOLE else DECODED_PIECE

    widest = max(at_once(rows) * columns for rows, columns in shapes)
    return widest * (1 + 4 + (work.compute_bytes if work.compute_bytes != 4 else 0))


def evaluation_bytes(work: Workload) -> tuple[float, float]:
    """Return what a forward pass of the evaluation needs: inside its widest block, and for logits.

    Nothing is kept: the stream, the MLP's projection, its activation and their product are alive together;
    logits and log-softmax are ``8 C V``.
    """
    geometry, batch = work.geometry, work.batch
    if not batch.eval_rows:
        return 0.0, 0.0
    tokens = batch.eval_rows * batch.length
    inner = geometry.mlp_size * (2 if geometry.is_first else 4)
    if geometry.mixture is not None:
        experts = geometry.mixture.num_chosen * (2 * geometry.hidden_size + 4 * geometry.mixture.expert_size)
        inner = max(inner, experts)
    labels = _eval_labels(work)
    inside = tokens * (work.compute_bytes * inner + 3 * work.residual_bytes * geometry.hidden_size)
    return inside, 4.0 * (_head_rows(work, labels) + labels) * geometry.vocab_size


def _eval_labels(work: Workload) -> int:
    labels = work.batch.num_labels // work.batch.rows * work.batch.eval_rows
    return min(labels, max(HEAD_ROWS, LOGITS_PER_CHUNK // work.geometry.vocab_size))
