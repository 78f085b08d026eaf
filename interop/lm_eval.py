r"""Tasks for lm-evaluation-harness (PyPI lm_eval) from a prepared split.

The likelihood of its documents, and a choice between endings.

    python -m interop.lm_eval wikitext2 --split=test --to=out/tasks
    lm_eval run --model hf --model_args pretrained=DIR,trust_remote_code=True \
        --tasks wikitext2_test,wikitext2_test_choice --include_path out/tasks

DIR is a folder of `python -m interop.export`. The first task gives the word_perplexity,
byte_perplexity and bits_per_byte that
`python -m analysis.perplexity --documents` gives. The second: 24 words of a paragraph, and four
endings of 12
words of which one is its own.
"""

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from base.command_line import cli, parse
from base.errors import UserError, check
from base.files import write_whole
from text.token_files import data_folder, documents_of, load_data

CONTEXT, ENDING, ENDINGS = 24, 12, 4  # words, words, choices: short enough for small models


@dataclass
class HarnessConfig:
    """Tasks for lm-evaluation-harness"""

    dataset: list[str] = field(default_factory=list)
    """a folder under data/, or a path"""
    split: str = "test"
    """train, val or test"""
    to: str | None = None
    """the folder to write the tasks to (harness: --include_path)"""
    questions: int = 200
    """most questions of the choice"""
    seed: int = 0
    """draws the wrong endings"""

    def problems(self) -> list[str]:
        found = [] if len(self.dataset) == 1 else ["name one prepared folder, such as wikitext2"]
        found += [] if self.to else ["name the folder to write to with --to=DIR"]
        return found + (
            [f"questions={self.questions} must be at least 1"] if self.questions < 1 else []
        )


def questions(texts: list[str], count: int, seed: int) -> list[dict]:
    """At most `count` questions of paragraphs that are long enough, evenly spread over the
    texts."""
    rng = random.Random(seed)
    paragraphs = [
        words
        for text in texts
        for line in text.splitlines()
        if len(words := line.split()) >= CONTEXT + ENDING
    ]
    chosen = (
        [paragraphs[i * len(paragraphs) // count] for i in range(count)]
        if len(paragraphs) > count
        else paragraphs
    )
    made = []
    for i, words in enumerate(chosen):
        others = rng.sample(
            [w for j, w in enumerate(chosen) if j != i], min(ENDINGS - 1, len(chosen) - 1)
        )
        endings = [w[CONTEXT : CONTEXT + ENDING] for w in (words, *others)]
        order = rng.sample(range(len(endings)), len(endings))
        choices = [" ".join(endings[k]) for k in order]
        made.append(
            {"context": " ".join(words[:CONTEXT]), "choices": choices, "answer": order.index(0)}
        )
    return made


def main():
    (c,) = parse(sys.argv[1:], HarnessConfig, words="dataset")
    data = load_data(data_folder(c.dataset[0]))
    if c.split not in data.splits:
        raise UserError(f"{data.folder} has no split {c.split}: it has {', '.join(data.splits)}")
    words = data.load_tokenizer()
    texts = [words.decode(ids[1:]) for ids in documents_of(data, c.split)]
    asked = questions(texts, c.questions, c.seed)
    check(
        []
        if len(asked) >= ENDINGS
        else [
            f"{data.folder} {c.split} has {len(asked)} paragraphs of {CONTEXT + ENDING} words: too"
            " few for a choice"
        ]
    )
    to, name = Path(c.to).resolve(), f"{data.folder.name}_{c.split}"
    shared = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    likelihood = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    try:
        to.mkdir(parents=True, exist_ok=True)
        for task, rows, settings in (
            (name, [{"text": t} for t in texts], likelihood),
            (f"{name}_choice", asked, choice),
        ):
            file = to / f"{task}.jsonl"
            write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
            settings = {
                "task": task,
                **shared,
                "dataset_kwargs": {"data_files": {"test": str(file)}},
                **settings,
            }
            write_whole(to / f"{task}.yaml", yaml.safe_dump(settings, sort_keys=False))
            print(
                f"wrote {to / task}.yaml: {len(rows)}"
                f" {'questions' if task != name else 'documents'}"
            )
    except OSError as error:
        raise UserError(f"to={c.to} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    cli(main)
