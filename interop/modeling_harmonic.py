"""transformers' GPT-2, BERT, Qwen2 and Qwen3 with a harmonic head: the logit of token v is -n log
d(h, w_v).

`python -m interop.export` puts this file into the folder of a model, and beside it the parts of
the package `harmonic` that it needs. Where that package is installed it is used instead: it has
compiled kernels.
"""

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

try:
    from harmonic.integrations.transformers import Swapped
except ImportError:
    from .harmonic_transformers import Swapped


class HarmonicGPT2Config(GPT2Config):
    model_type = "harmonic_gpt2"


class HarmonicBertConfig(BertConfig):
    model_type = "harmonic_bert"


class HarmonicQwen2Config(Qwen2Config):
    model_type = "harmonic_qwen2"


class HarmonicQwen3Config(Qwen3Config):
    model_type = "harmonic_qwen3"


class HarmonicGPT2(Swapped, GPT2LMHeadModel):
    config_class = HarmonicGPT2Config


class HarmonicBert(Swapped, BertForMaskedLM):
    config_class = HarmonicBertConfig


class HarmonicQwen2(Swapped, Qwen2ForCausalLM):
    config_class = HarmonicQwen2Config


class HarmonicQwen3(Swapped, Qwen3ForCausalLM):
    config_class = HarmonicQwen3Config
