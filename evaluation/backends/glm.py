"""A loaded GLM behind an evaluation: the request engine answers, and the model's identity says what answered.

Besides ``prompt_encoder.py`` and ``vllm_engine.py``, the only file of ``evaluation`` that needs PyTorch and
glmtune's models; everything else runs on saved answers without them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.backend import Drawing, Limits, ModelIdentity
from evaluation.backends.prompt_encoder import PromptEncoder, is_chat_model
from evaluation.sample import ChoiceScores, Completion, Prompt, WindowLoss
from glmtune.adapter import find_adapter, load_adapter
from glmtune.errors import ConfigError
from glmtune.inference.engine.model import Drafting
from glmtune.inference.engine.plain import PlainEngine, engine_for
from glmtune.inference.load_draft import load_draft
from glmtune.inference.perplexity import token_losses
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.loading import load_tokenizer, load_tuned
from glmtune.memory import WITH_OWN_MEMORY, device_name
from glmtune.models.architectures.unwrap import unwrapped
from glmtune.models.checkpoints.fingerprint import architecture_hash, hash_tensors
from glmtune.models.devices import choose_device, count_devices
from glmtune.models.releases.families import Family
from glmtune.models.settings import ModelSettings
from glmtune.prefix.attach import prefix_of, strength_of
from glmtune.quantization.kernels.dispatch import prepare_for_inference
from glmtune.quantization.layers.embeddings import rounded_embeddings
from glmtune.switch.model import switch_of

_ADAPTER_NAME = re.compile(r"(^|\.)(lora_\w+|prefix_encoder)\.")


class GlmBackend:
    """Answers prompts with a model in this process: any GLM, tuned or quantized, on CPU or one GPU.

    Where several processes evaluate, each builds its own and is given its own share of the prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        is_chat: bool | None = None,
        settings: EngineSettings | None = None,
        activations: str | None = None,
        system: str | None = None,
        tuned: str = "",
        draft: Drafting | None = None,
    ) -> None:
        """Take a model as `glmtune.load_model` returns it, with what was attached to it since.

        Args:
            model: switched to evaluation mode; its weights must not change while the backend lives.
            tokenizer: from `glmtune.load_tokenizer`.
            name: how the user named the model; None takes ``model.source``.
            is_chat: whether prompts are conversations; None decides by the name, or by whether a folder in
                transformers' format has a chat template (`is_chat_model`).
            settings: how much is done at once.
            activations: what the inputs of quantized layers are rounded to, if they are.
            system: system message of conversations, where the model was tuned with one.
            tuned: what was attached to the model, as the user named it.
            draft: a model that drafts tokens.
        """
        self._model = model
        self._encoder = PromptEncoder(tokenizer, system=system)
        self._engine = engine_for(model, settings, draft)
        # What changes how numbers come out stands in the identity, so that a journal is not continued
        # otherwise.
        if is_chat is None and not self._encoder.has_chat_template:
            is_chat = False
        found = identify(model, self._encoder.family, name=name, is_chat=is_chat)
        kept = self._engine.settings.kv_cache
        if isinstance(self._engine, PlainEngine):
            found = dataclasses.replace(found, engine="transformers")
        engine = found.engine if kept == "plain" else f"{found.engine}, {kept} kv_cache"
        quantization = (
            found.quantization if activations is None else f"{found.quantization}-a{activations[3:]}"
        )
        if rounded_embeddings(model) is not None:
            quantization += "-e8"
        beside = hash_beside_weights(model, self._encoder.vocabulary_hash)
        if (switch := switch_of(model)) is not None:
            beside = hashlib.sha256(f"{beside} {switch.fingerprint}".encode()).hexdigest()[:16]
        if system is not None:
            beside = hashlib.sha256(f"{beside} {system}".encode("utf-8", "backslashreplace")).hexdigest()[:16]
        self._identity = dataclasses.replace(
            found, engine=engine, quantization=quantization, config_hash=beside, tuned=tuned
        )

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is, what is attached to it and how it computes."""
        return self._identity

    @property
    def device(self) -> str:
        """What computes, such as ``cpu`` or ``cuda:0 (NVIDIA H200)``."""
        device = unwrapped(self._model).device
        return f"{device} ({device_name(device)})" if device.type in WITH_OWN_MEMORY else str(device)

    @property
    def max_context_tokens(self) -> int:
        """Prompt and completion together may be so long."""
        return self._engine.max_context_tokens

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the length of a prompt in tokens, ``[gMASK] sop`` and template included."""
        return len(self._encoder.ids(prompt))

    def generate(self, prompts: Sequence[Prompt], limits: Limits) -> Iterator[tuple[int, Completion]]:
        """Complete prompts; see `evaluation.backend.Backend`.

        Texts are as decoded: without special tokens, not stripped or cleaned; with ``<think>`` in front where
        the prompt ends with it.

        Yields:
            Place of the prompt and its completion, as they finish.

        Raises:
            ConfigError: a prompt with its completion does not fit the model's context.
            DataError: turns that the model's template cannot show.
            GlmtuneError: memory does not suffice even for one prompt.
        """
        thinks = any(self._encoder.opens_thoughts(prompt) for prompt in prompts)
        texts = self._engine.generate(
            [self._encoder.ids(prompt) for prompt in prompts],
            max_new_tokens=limits.max_new_tokens,
            stop_ids=self._encoder.stop_ids,
            decode=self._encoder.decode,
            stop=() if thinks else limits.stop,
            samplings=_samplings(prompts, limits.drawing),
        )
        for made in texts:
            found = Completion(made.text, made.stop_reason, made.num_prompt_tokens, made.num_new_tokens)
            yield made.index, self._encoder.completed(prompts[made.index], found, limits.stop)

    def score_choices(
        self, prompts: Sequence[Prompt], choices: Sequence[str]
    ) -> Iterator[tuple[int, ChoiceScores]]:
        """Return how probable each choice is as the next token; see `evaluation.backend.Backend`.

        The answer to a chat is encoded as the model's template encodes answers. Ids with which all answers
        begin (the line break after ChatGLM3's role token) count as part of the prompt.

        Yields:
            Place of the prompt and its scores, as they finish.

        Raises:
            ConfigError: a prompt does not fit the model's context.
            DataError: a choice is no single token after a prompt, or two choices are the same one.
            GlmtuneError: memory does not suffice even for one prompt.
        """
        # All prompts first: a choice that is no single token stops the run before anything is computed.
        asked = [self._encoder.choice_ids(prompt, choices) for prompt in prompts]
        scores = self._engine.score_next([context for context, _ in asked], [ids for _, ids in asked])
        for place, logprobs in scores:
            yield place, ChoiceScores(logprobs, self.count_tokens(prompts[place]))

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights as they are held: codes, scales, and what is not quantized."""
        return sum(
            tensor.numel() * tensor.element_size() for tensor in unwrapped(self._model).state_dict().values()
        )

    def text_losses(self, text: str, window_tokens: int) -> list[WindowLoss]:
        """Read a plain text window by window; see `glmtune.inference.perplexity`.

        Args:
            text: as a base model would continue it.
            window_tokens: tokens read at once.

        Raises:
            ConfigError: a window does not fit the model's context.
            DataError: the text is empty.
        """
        windows = token_losses(self._model, self._encoder.plain_ids, text, window_tokens=window_tokens)
        return [WindowLoss(len(losses_S), float(losses_S.double().sum())) for losses_S in windows]


def load_backend(
    model: ModelSettings,
    *,
    prefix_path: str | None = None,
    prefix_strength: float = 1.0,
    adapter_path: str | None = None,
    adapter_scale: float = 1.0,
    is_chat: bool | None = None,
    settings: EngineSettings | None = None,
    num_threads: int | None = None,
    system: str | None = None,
    use_switch: bool = True,
    draft: DraftSettings | None = None,
) -> GlmBackend:
    """Load a model with what was tuned, ready to answer.

    Args:
        model: which one, and how.
        prefix_path: tuned prefix, if any.
        prefix_strength: how much it counts, see `glmtune.load_model`.
        adapter_path: LoRA adapter, if any.
        adapter_scale: what it is multiplied by.
        is_chat: see `GlmBackend`.
        settings: see `GlmBackend`.
        num_threads: threads of the CPU; None leaves PyTorch's choice.
        system: see `GlmBackend`.
        use_switch: obey the switch of what was tuned, if it has one. Perplexity has no prompts to decide by:
            there what was tuned always applies.
        draft: a smaller model that drafts tokens, if any.

    Raises:
        GlmtuneError: see `glmtune.loading.load_model`.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    tokenizer = load_tokenizer(model.source, family=model.family)
    loaded: Any = load_tuned(
        model.source,
        dtype=model.dtype,
        **_where(model),
        family=model.family,
        quantization=model.method,
        quantization_embeddings=model.quantization_embeddings,
        prefix=prefix_path,
        use_switch=use_switch,
        prefix_strength=prefix_strength,
    )
    if adapter_path is not None:
        loaded = load_adapter(find_adapter(adapter_path), loaded, scale=adapter_scale)
    # The identity is taken before the layers are prepared: packing for a kernel changes the stored codes,
    # and the same model must have the same hash on every machine.
    activations = model.quantization_activations
    tuned = f"prefix {prefix_path}" if prefix_path else f"LoRA {adapter_path}" if adapter_path else ""
    if prefix_strength != 1:
        tuned += f" at strength {prefix_strength:g}"
    if adapter_scale != 1:
        tuned += f" at scale {adapter_scale:g}"
    options: dict[str, Any] = {
        "is_chat": is_chat, "settings": settings, "activations": activations,
        "tuned": tuned, "system": system,
        "draft": None if draft is None else load_draft(draft, model),
    }  # fmt: skip
    backend = GlmBackend(loaded, tokenizer, name=model.source, **options)
    prepare_for_inference(loaded, activations=activations)
    return backend


def _samplings(prompts: Sequence[Prompt], drawing: Drawing | None) -> list[Sampling]:
    """Return how the tokens of each prompt are drawn; nothing where they are not."""
    if drawing is None:
        return []
    chosen = Sampling(temperature=drawing.temperature, top_p=drawing.top_p, top_k=drawing.top_k)
    return [dataclasses.replace(chosen, seed=prompt.seed) for prompt in prompts]


def _where(model: ModelSettings) -> dict[str, Any]:
    """Return where the model goes: with torchrun, each process takes the GPU of its local rank."""
    kind = choose_device(model.device).type
    if model.is_split and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "`model.device_map` or `model.num_gpus` splits the model over the GPUs, but several processes"
            " were started, each of which would do so. Start one, or leave these settings out."
        )
    if model.is_split or model.device != "auto" or kind not in WITH_OWN_MEMORY:
        return model.where
    local = int(os.environ.get("LOCAL_RANK", "0")) % count_devices(kind)
    return model.where | {"device": f"{kind}:{local}"}


def identify(
    model: PreTrainedModel, family: Family, *, name: str | None = None, is_chat: bool | None = None
) -> ModelIdentity:
    """Describe a loaded model: its weights, what is attached to it, and how it computes.

    The hashes cover name, shape, type and some 4,096 spread values of every tensor.
    """
    base = unwrapped(model)
    chosen = name or str(getattr(base, "source", "")) or family.value
    # PEFT's LoRA and an attached prefix add tensors to the model and rename those they wrap; the base keeps
    # its hash.
    weights: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for key, tensor in base.state_dict().items():
        (adapter if _ADAPTER_NAME.search(key) else weights)[key.replace(".base_layer.", ".")] = tensor
    embedding = base.get_input_embeddings().weight
    return ModelIdentity(
        name=chosen,
        weights_hash=hash_tensors(weights),
        family=family.value,
        # An embedding stored in codes has no float type of its own.
        dtype=str(embedding.dtype if embedding.is_floating_point() else base.dtype).removeprefix("torch."),
        quantization=_quantization(base),
        adapter=hash_tensors(adapter) if adapter else "none",
        is_chat=is_chat_model(chosen, family) if is_chat is None else is_chat,
        engine="glmtune",
    )


def hash_beside_weights(model: PreTrainedModel, vocabulary_hash: str) -> str:
    """Return 16 hexadecimal digits of what makes other numbers of the same tensors.

    That is the configuration (a rotary base that was edited), the vocabulary, the factor that LoRA's product
    is multiplied with, which PEFT keeps beside the tensors, and the strength of a prefix.

    Args:
        model: with what is attached to it.
        vocabulary_hash: of its tokenizer.
    """
    base = unwrapped(model)
    scaling = {
        name: [float(value) for _, value in sorted(factors.items())]
        for name, module in base.named_modules()
        if isinstance(factors := getattr(module, "scaling", None), dict) and factors
    }
    parts: list[Any] = [architecture_hash(base.config), vocabulary_hash, scaling]
    strength = 1.0 if prefix_of(base) is None else strength_of(base)
    if strength != 1:  # runs from before there was a choice do not name it
        parts.append(strength)
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _quantization(base: Any) -> str:
    """Return the method the model names: our own, or one of transformers'."""
    if getattr(base, "quantization", None):
        return str(base.quantization)
    settings = getattr(base.config, "quantization_config", None)
    if settings is None:
        return "none"
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))
