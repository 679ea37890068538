"""Ask when a model of glm-tiny's size learns to copy: by alphabet, learning rate, first weights, batch, loss.

A row is a random string, a separator, and the same string, as often as asked. Printed every 100 steps:
the share of characters of the last copy that are the most probable ones. See docs/log.md for what came out.

python benchmarks/tiny_induction.py --symbols 4000 --tied --embedding-std 0.07 --learn-prompts --minutes 2
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch
from transformers import GlmConfig, GlmForCausalLM

from glmtune.labels import IGNORE_INDEX

PAD, END, START, AGAIN, FIRST = 0, 2, 3, 4, 8


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--symbols", type=int, default=300, help="characters of the alphabet")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of the first weights")
    parser.add_argument("--embedding-std", type=float, default=0.02, help="the same of embedding and head")
    parser.add_argument("--tied", action="store_true", help="embedding and head are one matrix")
    parser.add_argument("--rows", type=int, default=32, help="strings in a batch")
    parser.add_argument("--row-tokens", type=int, default=0, help="repeat a string up to so many tokens")
    parser.add_argument(
        "--learn-prompts", action="store_true", help="loss on every token, not the copy alone"
    )
    parser.add_argument("--minutes", type=float, default=2)
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> GlmForCausalLM:
    """Make a model of glm-tiny's shape over another alphabet."""
    config = GlmConfig(
        vocab_size=FIRST + options.symbols,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        rms_norm_eps=1e-5,
        pad_token_id=PAD,
        eos_token_id=END,
        initializer_range=options.std,
        use_cache=False,
    )
    model = GlmForCausalLM(config)
    for matrix in (model.model.embed_tokens, model.lm_head):
        torch.nn.init.normal_(matrix.weight, std=options.embedding_std)
    if options.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def make_batch(options: argparse.Namespace, length: int) -> torch.Tensor:
    """Draw strings and repeat them: start, string, (separator, string) as often as asked, end."""
    text = torch.randint(FIRST, FIRST + options.symbols, (options.rows, length))
    begin, again, end = (torch.full((options.rows, 1), token) for token in (START, AGAIN, END))
    copies = max(1, options.row_tokens // (length + 1) - 1)
    return torch.cat([begin, text, *[again, text] * copies, end], dim=1)


def main() -> None:
    """Train on fresh strings until the time is up."""
    options = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = random.Random(0)
    model = make_model(options)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    start, step, tokens = time.monotonic(), 0, 0
    while time.monotonic() - start < options.minutes * 60:
        length = lengths.randint(3, 16)
        input_ids = make_batch(options, length)
        labels = input_ids.clone()
        if not options.learn_prompts:
            labels[:, : length + 2] = IGNORE_INDEX
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=input_ids, labels=labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        step, tokens = step + 1, tokens + input_ids.numel()
        if step % 100 == 0:
            copied = output.logits[:, -length - 2 : -2].argmax(-1) == input_ids[:, -length - 1 : -1]
            sys.stdout.write(f"step {step}  {tokens} tokens  copied {copied.float().mean():.0%}\n")


if __name__ == "__main__":
    main()
