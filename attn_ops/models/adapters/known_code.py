"""The code of KerasHub that the adapters were checked against: `fingerprint`s of a method and of the steps of its seam.

`python tests/compat/seams.py` tells those of the releases; what is new is compared by hand before it is added.
"""

KNOWN_CODE = {
    "CachedGemmaAttention._compute_attention": ("2a69ebcefef7", "d08368176843"),
    "CachedMistralAttention._compute_attention": ("29e41a5cbf61",),
    "CachedMixtralAttention._compute_attention": ("2006eefaf81c",),
    "GPTNeoXAttention._compute_attention": ("5d2e63edcb74",),
    "GPTNeoXDecoder._compute_self_attention_mask": ("9afaeb6d87a2",),
    "GemmaDecoderBlock._compute_attention_mask": ("c287f6c89549",),
    "GptOssAttention._compute_attention": ("fa27b46d923b",),
    "GptOssTransformerDecoder._compute_self_attention_mask": ("09a4121d4cd9",),
    "LlamaAttention._compute_attention": ("29e41a5cbf61",),
    "LlamaTransformerDecoder._compute_self_attention_mask": ("09a4121d4cd9",),
    "MistralTransformerDecoder._compute_self_attention_mask": ("221f146f5afd",),
    "MixtralTransformerDecoder._compute_self_attention_mask": ("221f146f5afd",),
    "Phi3Attention._compute_attention": ("a33f71924031",),
    "Phi3Decoder._compute_self_attention_mask": ("9e8e4a71058c",),
    "Qwen3Attention._compute_attention": ("8143800ac498",),
    "Qwen3MoeAttention._compute_attention": ("8143800ac498",),
    "Qwen3MoeTransformerDecoder._compute_self_attention_mask": ("09a4121d4cd9",),
    "Qwen3TransformerDecoder._compute_self_attention_mask": ("09a4121d4cd9",),
    "Qwen3_5Attention._compute_attention": ("9450c7e60ce0",),
    "Qwen3_5MoeTransformerDecoder._compute_self_attention_mask": ("229e5b2cbe6f",),
    "Qwen3_5TransformerDecoder._compute_self_attention_mask": ("229e5b2cbe6f",),
    "QwenAttention._compute_attention": ("baa9243e81c7", "ac1ed2735f74"),
    "QwenMoeAttention._compute_attention": ("2fb34befe046",),
    "QwenMoeTransformerDecoder._compute_self_attention_mask": ("09a4121d4cd9",),
    "QwenTransformerDecoder._compute_self_attention_mask": ("09a4121d4cd9",),
    "SmolLM3Attention._compute_attention": ("620f45b2aecf", "6730bd4313a5"),
    "SmolLM3DecoderLayer._compute_self_attention_mask": ("09a4121d4cd9",),
    "TransformerDecoder._compute_self_attention_mask": ("8210f524ff7a",),
}
