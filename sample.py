"""Continues a text with a trained run, or predicts masked tokens with a BERT.

With --explain it shows which prototypes and coordinates decided each token.

    python sample.py --out_dir=out/manhattan --start="The" --num_samples=2 --max_new_tokens=100
    python sample.py --out_dir=out/manhattan --start="The" --temperature=0.8 --top_k=200 --seed=1
    python sample.py --out_dir=out/manhattan --start="The" --explain
    python sample.py --out_dir=out/manhattan --start="<|endoftext|>The" --stop_at_eot
    python sample.py --out_dir=out/manhattan --start="The" --ann --ann_candidates=512
    python sample.py --out_dir=out/manhattan --prompts=prompts.txt --json > texts.jsonl
    python sample.py --out_dir=out/bert --start="The film was [MASK] and far too long."
"""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from base.loading import say_loading

if __name__ == "__main__":
    say_loading()  # The imports below take seconds.

import torch
from tqdm import tqdm

from base.command_line import cli, parse
from base.errors import UserError, check, too_small
from base.files import special_file
from harmonic import HarmonicHead, contributions, paired_distance
from harmonic.integrations.faiss import NearestHead
from model import Diverged, Model
from text.token_files import tokenizer_folder
from text.tokenizers import MASK, Tokenizer, load_tokenizer
from training import checkpoint
from training.distributed import check_device

MOST_TOKENS = 100_000_000  # Room for all new tokens is reserved at once.


# Settings that only matter where text is written.
OF_WRITING = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "cache")


@dataclass
class SampleConfig:
    """Sampling"""

    out_dir: str = "out/run"
    """the run's folder"""
    checkpoint: Literal["newest", "best"] = "newest"
    """which checkpoint of the run"""
    start: list[str] = field(default_factory=list)
    """prompts, as in --start="The" "A second one". FILE:prompt.txt reads one prompt from a file
    (UTF-8; line ends become \\n, and a last one stays), FILE:- from standard input. Without a
    prompt the model begins a document. <|endoftext|> in a prompt ([SEP] for bert) is the
    end-of-text token"""
    prompts: str = ""
    """a file with one prompt a line (UTF-8), or - for standard input; empty lines are skipped.
    Prompts of --start come first"""
    num_samples: int = 1
    """texts for each prompt"""
    max_new_tokens: int = 200
    """tokens to add. When a text reaches block_size, the older half of the context is dropped"""
    stop_at_eot: bool = False
    """end a text at the end-of-text token, which is not shown"""
    stop: str | None = None
    """end a text after this text, such as --stop=. for one sentence, or --stop=$'\\n' for a line"""
    temperature: float = 0.8
    """below 1 safer choices, above 1 more random ones; 0 = always the likeliest token"""
    top_k: int | None = 200
    """choose among the k likeliest tokens; null = all"""
    top_p: float | None = None
    """choose among the likeliest tokens that together have probability p; null = all"""
    min_p: float | None = None
    """choose among tokens with at least this share of the likeliest one's probability; null =
    all"""
    seed: int = 1337
    """the same seed gives the same text"""
    explain: bool = False
    """print for each new token the nearest prototypes, and the coordinates that contribute most to
    its distance. p is the model's probability, before temperature, top_k, top_p and min_p"""
    json: bool = False
    """print one line of JSON for each text, and nothing else on stdout. Its keys: prompt, text
    (what was added), tokens (its ids; after a stop the last may be longer than text),
    finish_reason (eot, stop or length)"""
    ann: bool = False
    """compute logits for the nearest prototypes only, which faiss finds (pip install faiss-cpu)"""
    ann_candidates: int = 512
    """how many prototypes get a logit with --ann"""
    ann_index: Literal["flat", "hnsw"] = "flat"
    """flat finds exactly the nearest prototypes. hnsw finds most of them, and takes longer to
    build"""
    cache: bool = True
    """keep the keys and values of attention; false computes the context again for each token, which
    gives the same text and is slower"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of the trunk (autocast)"""

    def problems(self) -> list[str]:
        found = too_small(self, num_samples=1, max_new_tokens=1, ann_candidates=1)
        too_long = f"max_new_tokens={self.max_new_tokens} must be at most {MOST_TOKENS}"
        found += [too_long] * (self.max_new_tokens > MOST_TOKENS)
        if not 0 <= self.seed < 2**31:
            found.append(f"seed={self.seed} is not in 0..{2**31 - 1}")
        if self.temperature < 0:
            found.append(f"temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k={self.top_k} must be at least 1 (null = all)")
        for key in ("top_p", "min_p"):
            value = getattr(self, key)
            if value is not None and not 0 < value <= 1:
                found.append(f"{key}={value} is not in (0, 1]")
        if [*self.start, f"FILE:{self.prompts}"].count("FILE:-") > 1:
            found.append("only one of --start and --prompts can be standard input (-)")
        found += [
            f"{text!r} is a run's folder, not a prompt: use --out_dir={text}"
            for text in self.start
            if os.path.isfile(os.path.join(text, "config.yaml"))
        ]
        for key in ("ann_candidates", "ann_index"):
            if not self.ann and getattr(self, key) != getattr(SampleConfig, key):
                found.append(f"{key}={getattr(self, key)} does nothing without --ann")
        found += ["stop is empty: name a text, or leave it out"] * (self.stop == "")
        if self.json and self.explain:
            found.append(
                "json=true and explain=true exclude each other: the JSON has no explanations"
            )
        return found


def read_prompt(text: str) -> str:
    """The prompt that a text stands for: the contents of a file for `FILE:path`, else the text."""
    return read_text(text[5:], f"--start={text}") if text.startswith("FILE:") else text


def read_text(name: str, flag: str) -> str:
    """Reads a UTF-8 file, or standard input for `-`. A byte-order mark is dropped, and line ends
    become `\\n`.

    flag: the flag that names the file, for error messages.
    Raises: UserError if it cannot be read or is not UTF-8 text.
    """
    given = name == "-"
    try:
        if not given and (special := special_file(os.stat(name).st_mode)):
            raise UserError(
                f"{flag}: a {special}, which may never end; save its text in a file, or give it on"
                " standard input and name -"
            )
        with open(0 if given else name, encoding="utf-8-sig", closefd=not given) as file:
            prompt = file.read()
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag}: not UTF-8 text") from None
    if "\0" in prompt:
        raise UserError(
            f"{flag}: it holds NUL characters, so it is not UTF-8 text but perhaps UTF-16: save it"
            " as UTF-8"
        )
    return prompt


def encode(prompt: str, tokenizer: Tokenizer, masked: bool) -> list[int]:
    """The ids of a prompt.

    masked: replace `[MASK]` by the tokenizer's mask token.
    Raises: UserError if the prompt has no tokens, unknown characters, or (masked) no mask.
    """
    if not prompt:
        raise UserError(
            "the prompt is empty: give --start=TEXT, or leave --start out to begin a document"
        )
    if masked:
        prompt = prompt.replace(MASK, "[MASK]")  # Both work, with any tokenizer.
        if "[MASK]" not in prompt:
            raise UserError(
                "a bert is a masked language model and does not continue a text: put [MASK] into"
                " --start, as in --start='The film was [MASK].'"
            )
        pieces = [tokenizer.encode_prompt(piece) for piece in prompt.split("[MASK]")]
        ids = [i for piece in pieces for i in (*piece, tokenizer.mask_id)][:-1]
    else:
        ids = tokenizer.encode_prompt(prompt)
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens")
    if tokenizer.unk_id in ids:
        raise UserError(
            f"the prompt {prompt!r} has characters that the tokenizer {tokenizer.name} does not"
            " know"
        )
    return ids


class Explainer:
    """Collects lines for each row that say why each token was chosen.

    `Model.generate` calls it at each step with (hidden states (B, C), tokens (B,)).
    """

    nearest, coordinates = 5, 4  # How many prototypes and coordinates are shown.

    def __init__(self, model: Model, tokenizer: Tokenizer, rows: int):
        self.head, self.tokenizer = model.head, tokenizer
        self.lines: list[list[str]] = [[] for _ in range(rows)]
        row = self.head.distance
        power = 1 / row.root(**row.kernel_options(row.options | self.head.options))
        if row.has_products:
            self.share = "of sum |h w|"
        elif row.map is not None and row.map.multiplies:
            self.share = "of sum |d (P d)|, with d = h - w"
        elif power != 1:
            self.share = f"of d^{power:g}"
        else:
            self.share = "of d"
        # The maximum of chebyshev is at one coordinate, which decides alone.
        self.only = 1 if row.kernel == "linf" else self.coordinates

    def legend(self) -> str:
        """What the lines below a text mean, in sentences."""
        value, what = "d", "d, the distance of its prototype from the hidden state"
        if self.head.is_control:
            value, what = "the logit", "its logit"
        width = self.head.weight.shape[1]
        return (
            f"Each token below is shown with {what}, and with p, its probability before"
            " temperature, top_k, top_p and min_p.\n"
            f"nearest shows the {self.nearest} likeliest tokens in the same way.\n"
            f"coordinates shows which of the {width} coordinates of hidden state and prototype"
            f" contribute most to {value}, and the share of each."
        )

    def __call__(self, h: torch.Tensor, tokens: torch.Tensor) -> None:
        head = self.head
        probability = head(h).softmax(-1)
        for row, token in enumerate(tokens.tolist()):
            top = probability[row].topk(min(self.nearest, head.real_vocab_size)).indices
            values = paired_distance(
                h[row],
                head.weight[torch.cat((tokens[row : row + 1], top))],
                head.name,
                **head.geometry(),
            ).tolist()
            shares = contributions(h[row], head.weight[token], head.name, **head.geometry())
            best = shares.topk(min(self.only, shares.numel()))
            carried = ", ".join(
                f"{c} ({s:.1%})"
                for s, c in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
            near = "  ".join(
                f"{self._show(t)} {v:.5g} ({probability[row, t]:.1%})"
                for t, v in zip(top.tolist(), values[1:], strict=True)
            )
            symbol = "logit" if self.head.is_control else "d"
            self.lines[row].append(
                f"{self._show(token):>16}  {symbol} {values[0]:.5g}  p"
                f" {probability[row, token]:.1%}\n"
                f"{'nearest:':>18} {near}\n{'coordinates:':>18} {carried} {self.share}"
            )

    def _show(self, token: int) -> str:
        return repr(self.tokenizer.decode_token(token))


def predict_masked(model: Model, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
    """Prints each prompt with its masks replaced by the likeliest tokens, and explains each mask.

    prompts: lists of ids. Raises: UserError if one is longer than block_size.
    """
    for number, ids in enumerate(prompts):
        if len(ids) > model.config.block_size:
            raise UserError(
                f"the prompt has {len(ids)} tokens, and the model's block_size is"
                f" {model.config.block_size}: shorten the prompt"
            )
        x = torch.tensor([ids], device=model.tokens.weight.device)
        h = model.hidden(x)[0, (x[0] == tokenizer.mask_id).nonzero()[:, 0]].float()
        p = model.head(h).softmax(-1)
        choices = iter(p.argmax(-1).tolist())
        print(tokenizer.decode([next(choices) if i == tokenizer.mask_id else i for i in ids]))
        explainer = Explainer(model, tokenizer, len(h))
        explainer(h, p.argmax(-1))
        if number == 0:
            print(explainer.legend())
        for mask, lines in enumerate(explainer.lines, 1):
            print(f"  mask {mask}\n{lines[0]}")
        print("---------------")


class ShownTexts:
    """The texts of all rows while they grow.

    eot_id: the token that ends a text; None if none does.
    stop: ends a text that it appears in; None if nothing does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        eot_id: int | None,
        stop: str | None = None,
    ):
        self.eot_id, self.stop = eot_id, stop
        self.streams = [tokenizer.stream_decoder() for _ in prompts]
        self.texts = [
            "".join(map(stream, ids)) for stream, ids in zip(self.streams, prompts, strict=True)
        ]
        # The ids that were added, with the end-of-text token.
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.lengths = [len(text) for text in self.texts]  # of the prompts
        # Why each text has ended: "eot" or "stop", and "" while it grows.
        self.ended = [""] * len(prompts)

    def add(self, tokens: list[int]) -> list[str]:
        """Adds the next token of each row. Returns what each text gains: "" if it has ended."""
        pieces = [""] * len(tokens)
        for row, token in enumerate(tokens):
            if not self.ended[row]:
                self.tokens[row].append(token)
                if token == self.eot_id:
                    self.ended[row] = "eot"
                else:
                    pieces[row] = self._until_stop(row, self.streams[row](token))
                    self.texts[row] += pieces[row]
        return pieces

    def _until_stop(self, row: int, piece: str) -> str:
        """What a piece adds to a text: nothing after `stop`, which may have begun before it."""
        if self.stop is None:
            return piece
        before = max(self.lengths[row], len(self.texts[row]) - len(self.stop) + 1)
        tail = self.texts[row][before:]
        found = (tail + piece).find(self.stop)
        if found < 0:
            return piece
        self.ended[row] = "stop"
        return piece[: found + len(self.stop) - len(tail)]

    def whole(self, row: int) -> str:
        """A complete text. Unless `stop` has ended it, it ends with what the decoder still holds,
        such as half a character."""
        rest = "" if self.ended[row] == "stop" else self.streams[row](None)
        return self.texts[row] + rest


def write(
    texts: ShownTexts, steps: Iterator[list[int]], explainer: Explainer | None, total: int
) -> None:
    """Prints the texts while `steps` yields the tokens of each step.

    A single text appears token by token. Of several, each appears when it is complete.
    total: the number of steps at most.
    """
    if len(texts.texts) == 1:
        shown = texts.texts[0]
        print(shown, end="", flush=True)
        for (piece,) in grow(texts, steps, total, progress=False):
            print(piece, end="", flush=True)
            shown += piece
        show(texts.whole(0)[len(shown) :], texts, 0, explainer)
        return
    for row in complete(texts, steps, total):
        show(texts.whole(row), texts, row, explainer)


def show(text: str, texts: ShownTexts, row: int, explainer: Explainer | None) -> None:
    """Prints a text, or the rest of it, and below it a rule or the explanation of its tokens."""
    with tqdm.external_write_mode():
        print(text)
        if explainer:
            legend = [explainer.legend()] if row == 0 else []
            lines = explainer.lines[row][: len(texts.tokens[row])]
            print("\n".join(["", *legend, *lines]), flush=True)
        if not explainer or len(texts.texts) > 1:
            print("---------------", flush=True)


def write_json(texts: ShownTexts, steps: Iterator[list[int]], total: int) -> None:
    """Prints a line of JSON for each text, as soon as it and all texts before it are complete."""
    prompts = list(texts.texts)
    for row in complete(texts, steps, total):
        line = {
            "prompt": prompts[row],
            "text": texts.whole(row)[len(prompts[row]) :],
            "tokens": texts.tokens[row],
            "finish_reason": texts.ended[row] or "length",
        }
        with tqdm.external_write_mode():
            print(json.dumps(line, ensure_ascii=not is_utf8(sys.stdout)), flush=True)


def is_utf8(stream: Any) -> bool:
    """Whether a stream can write all characters."""
    return str(getattr(stream, "encoding", None)).lower().replace("-", "") == "utf8"


def complete(texts: ShownTexts, steps: Iterator[list[int]], total: int) -> Iterator[int]:
    """Adds tokens. Yields the row of each text as soon as it and all before it are complete."""
    row, rows = 0, len(texts.ended)
    for _ in grow(texts, steps, total, progress=True):
        while row < rows and texts.ended[row]:
            yield row
            row += 1
    yield from range(row, rows)


def grow(
    texts: ShownTexts, steps: Iterator[list[int]], total: int, progress: bool
) -> Iterator[list[str]]:
    """Adds tokens until all texts are complete. Yields what each text gains in a step."""
    hidden = not progress or not sys.stderr.isatty()
    with tqdm(total=total, unit="token", disable=hidden, leave=False) as bar:
        for tokens in steps:
            yield texts.add(tokens)
            bar.update()
            if all(texts.ended):
                return


def read_prompts(c: SampleConfig, tokenizer: Tokenizer, masked: bool) -> list[list[int]]:
    """The ids of every prompt. UserError lists everything that is wrong with them."""
    problems, prompts, texts = [], [], []
    for text in c.start:
        try:
            texts.append(read_prompt(text))
        except UserError as error:
            problems.append(str(error))
    if c.prompts:
        lines = [
            line for line in read_text(c.prompts, f"--prompts={c.prompts}").split("\n") if line
        ]
        if not lines:
            raise UserError(f"--prompts={c.prompts}: the file has no prompts")
        texts += lines
    for text in texts:
        try:
            prompts.append(encode(text, tokenizer, masked))
        except UserError as error:
            problems.append(str(error))
    check(problems)
    return prompts


def refuse_writing(c: SampleConfig) -> None:
    """Raises one UserError for all settings that mean nothing to a masked language model."""
    problems = []
    if not c.start and not c.prompts:
        problems.append(
            "a bert is a masked language model and does not continue a text: give a prompt with"
            " [MASK], as in --start='The film was [MASK].'"
        )
    for flag, asked in (
        ("num_samples", c.num_samples > 1),
        ("stop_at_eot", c.stop_at_eot),
        ("stop", c.stop is not None),
        ("json", c.json),
        ("ann", c.ann),
        *((key, getattr(c, key) != getattr(SampleConfig, key)) for key in OF_WRITING),
    ):
        if asked:
            problems.append(f"--{flag} does nothing with a bert, a masked language model")
    check(problems)


def nearest_head(head: HarmonicHead, c: SampleConfig) -> NearestHead:
    """The head of --ann. UserError if faiss is missing or has no metric for the head."""
    began = time.perf_counter()
    try:
        nearest = NearestHead(head, c.ann_candidates, c.ann_index)
    except (ImportError, ValueError) as error:
        raise UserError(f"--ann: {error}") from None
    seconds = time.perf_counter() - began
    print(f"built a {c.ann_index} index in {seconds:.1f} s", file=sys.stderr)
    return nearest


def print_bounds(nearest: NearestHead, kind: str) -> None:
    """Prints how much probability --ann left out. kind: whether these are bounds or estimates."""
    bounds = nearest.bounds
    mean = sum(bounds) / len(bounds)
    print(
        f"probability of the tokens that --ann left out: {kind} {mean:.2g} on average,"
        f" {max(bounds):.2g} in the worst step",
        file=sys.stderr,
    )


def read_tokenizer(model: Model, stored: dict, c: SampleConfig) -> Tokenizer:
    """The tokenizer of a run. UserError if it has more tokens than the model."""
    folder = tokenizer_folder(Path(c.out_dir), stored["dataset"])
    tokenizer = load_tokenizer(stored["tokenizer"], folder)
    if tokenizer.vocab_size > model.head.real_vocab_size:
        raise UserError(
            f"{c.out_dir} has a model of {model.head.real_vocab_size} tokens, and its tokenizer"
            f" {tokenizer.name} in {folder} has {tokenizer.vocab_size}: put the tokenizer of its"
            " training text there"
        )
    return tokenizer


def print_notes(c: SampleConfig, longest: int, block_size: int) -> None:
    """Prints what a user may not expect. longest: the tokens of the longest prompt."""
    if c.temperature == 0 and c.num_samples > 1:
        print(
            f"note: with temperature=0 the {c.num_samples} texts of a prompt are equal",
            file=sys.stderr,
        )
    if longest + c.max_new_tokens > block_size:
        of_prompt = ". Of a longer prompt the model sees only the end" * (longest > block_size)
        print(
            f"note: a text of {longest + c.max_new_tokens} tokens does not fit into"
            f" block_size={block_size}: the context slides, and its older half is dropped each"
            f" time it is full{of_prompt}",
            file=sys.stderr,
        )


def main() -> None:
    (c,) = parse(sys.argv[1:], SampleConfig, words="start")
    try:
        sample(c)
    except Diverged as error:
        raise UserError(f"{c.out_dir}: {error}") from None


def sample(c: SampleConfig) -> None:
    """Loads a run and writes texts, or predicts the masked tokens of prompts."""
    device = check_device(c.device)
    model, stored, manifest = checkpoint.load_run(c.out_dir, device, c.checkpoint)
    tokenizer = read_tokenizer(model, stored, c)
    masked = not model.config.architecture.causal
    if masked:
        refuse_writing(c)
    prompts = read_prompts(c, tokenizer, masked)
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if c.dtype != "float32":
        autocast = torch.autocast(device, getattr(torch, c.dtype))
    print(f"{c.out_dir}, iteration {manifest['iter']}: {model.head.extra_repr()}", file=sys.stderr)
    with torch.inference_mode(), autocast:
        if masked:
            return predict_masked(model, tokenizer, prompts)

        rows = [p for p in prompts or [[tokenizer.start_id]] for _ in range(c.num_samples)]
        print_notes(c, max(map(len, rows)), model.config.block_size)
        explainer = Explainer(model, tokenizer, len(rows)) if c.explain else None
        nearest = nearest_head(model.head, c) if c.ann else None
        steps = model.generate(
            rows,
            c.max_new_tokens,
            seed=c.seed,
            head=nearest,
            cache=c.cache,
            explain=explainer,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            min_p=c.min_p,
        )
        began = time.perf_counter()
        # The first token reads the prompt, and may load compiled kernels.
        first = list(itertools.islice(steps, 1))
        ready = time.perf_counter()
        steps = itertools.chain(first, steps)
        shown = rows if prompts else [[] for _ in rows]  # The start token is not shown.
        texts = ShownTexts(tokenizer, shown, tokenizer.eot_id if c.stop_at_eot else None, c.stop)
        if c.json:
            write_json(texts, steps, c.max_new_tokens)
        else:
            write(texts, steps, explainer, c.max_new_tokens)
        seconds = time.perf_counter() - ready
    later = sum(map(len, texts.tokens)) - len(rows)
    speed = f", then {later / seconds:,.0f} tokens/s" if later else ""
    print(f"first token after {ready - began:.2f} s{speed}", file=sys.stderr)
    if nearest is not None:
        print_bounds(nearest, "at most" if c.ann_index == "flat" else "an estimated")


if __name__ == "__main__":
    cli(main)
