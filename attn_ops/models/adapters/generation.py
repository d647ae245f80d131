"""The seams of KerasHub's models that generate: their caches stay apart (layer_caches.py)."""

from __future__ import annotations

import dataclasses

from attn_ops.models.adapters import layer_caches
from attn_ops.models.adapters.hub_seam import hub_seam
from attn_ops.models.seams import Seam

_LANGUAGE_MODELS = {
    "bloom.bloom_causal_lm": "BloomCausalLM",
    "falcon.falcon_causal_lm": "FalconCausalLM",
    "gemma.gemma_causal_lm": "GemmaCausalLM",
    "gemma3.gemma3_causal_lm": "Gemma3CausalLM",  # its newest releases keep them apart themselves
    "gemma4.gemma4_causal_lm": "Gemma4CausalLM",
    "gpt2.gpt2_causal_lm": "GPT2CausalLM",
    "gpt_neo_x.gpt_neo_x_causal_lm": "GPTNeoXCausalLM",
    "gpt_oss.gpt_oss_causal_lm": "GptOssCausalLM",
    "llama.llama_causal_lm": "LlamaCausalLM",
    "mistral.mistral_causal_lm": "MistralCausalLM",
    "mixtral.mixtral_causal_lm": "MixtralCausalLM",
    "opt.opt_causal_lm": "OPTCausalLM",
    "pali_gemma.pali_gemma_causal_lm": "PaliGemmaCausalLM",
    "phi3.phi3_causal_lm": "Phi3CausalLM",
    "qwen.qwen_causal_lm": "QwenCausalLM",
    "qwen3.qwen3_causal_lm": "Qwen3CausalLM",
    "qwen3_5.qwen3_5_causal_lm": "Qwen3_5CausalLM",
    "qwen3_5_moe.qwen3_5_moe_causal_lm": "Qwen3_5MoeCausalLM",
    "qwen3_moe.qwen3_moe_causal_lm": "Qwen3MoeCausalLM",
    "qwen_moe.qwen_moe_causal_lm": "QwenMoeCausalLM",
    "smollm3.smollm3_causal_lm": "SmolLM3CausalLM",
}
_SEQUENCE_MODELS = {
    "bart.bart_seq_2_seq_lm": "BartSeq2SeqLM",
    "t5.t5_seq_2_seq_lm": "T5Seq2SeqLM",
    "t5gemma.t5gemma_seq_2_seq_lm": "T5GemmaSeq2SeqLM",
    "t5gemma2.t5gemma2_seq_2_seq_lm": "T5Gemma2Seq2SeqLM",
}


def _seams(module, name, method):
    """Those of `generate_step`, checked with all that the caches go through, and of the ``method`` with the caches,
    which does nothing but in there."""
    step = hub_seam(
        f"models.{module}",
        name,
        "generate_step",
        ("inputs", "stop_token_ids"),
        layer_caches.generate_step,
        ("_build_cache", method),
        attends=False,
    )
    yield dataclasses.replace(step, needed=False)
    yield Seam(step.module, name, method, None, layer_caches.Apart(method), attends=False, needed=False)


SEAMS = (
    *(seam for module, name in _LANGUAGE_MODELS.items() for seam in _seams(module, name, "call_with_cache")),
    *(seam for module, name in _SEQUENCE_MODELS.items() for seam in _seams(module, name, "call_decoder_with_cache")),
)
