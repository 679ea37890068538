"""Ask when a model of glm-tiny's size learns to copy: by alphabet, learning rate, first weights, loss.

A row is a random string, a separator, and the same string. What is printed is the share of copied characters
that are the most probable ones, every 100 steps. See docs/log.md for what came out.

python benchmarks/tiny_induction.py --symbols 300 --minutes 2
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
    parser.add_argument(
        "--learn-prompts", action="store_true", help="loss on every token, not the copy alone"
    )
    parser.add_argument("--minutes", type=float, default=2)
    return parser.parse_args()


def make_model(symbols: int, std: float) -> GlmForCausalLM:
    """Make a model of glm-tiny's shape over another alphabet."""
    config = GlmConfig(
        vocab_size=FIRST + symbols,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        rms_norm_eps=1e-5,
        pad_token_id=PAD,
        eos_token_id=END,
        initializer_range=std,
        use_cache=False,
    )
    return GlmForCausalLM(config)


def main() -> None:
    """Train on fresh strings until the time is up."""
    options = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = random.Random(0)
    model = make_model(options.symbols, options.std)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    start, step, tokens = time.monotonic(), 0, 0
    while time.monotonic() - start < options.minutes * 60:
        length = lengths.randint(3, 16)
        text = torch.randint(FIRST, FIRST + options.symbols, (32, length))
        begin, again, end = (torch.full((32, 1), token) for token in (START, AGAIN, END))
        input_ids = torch.cat([begin, text, again, text, end], dim=1)
        labels = input_ids.clone()
        if not options.learn_prompts:
            labels[:, : length + 2] = IGNORE_INDEX
        output = model(input_ids=input_ids, labels=labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        step, tokens = step + 1, tokens + input_ids.numel()
        if step % 100 == 0:
            copied = output.logits[:, length + 1 : -2].argmax(-1) == text
            sys.stdout.write(f"step {step}  {tokens} tokens  copied {copied.float().mean():.0%}\n")


if __name__ == "__main__":
    main()
