r"""Writes tasks for lm-evaluation-harness (PyPI lm_eval) from a prepared split.

One task is the likelihood of the documents. The other is a choice between four endings.

    python -m interop.lm_eval wikitext2 --split=test --to=out/tasks
    lm_eval run --model hf --model_args pretrained=DIR,trust_remote_code=True \
        --tasks wikitext2_test,wikitext2_test_choice --include_path out/tasks

DIR is a folder that `python -m interop.export` wrote. The first task gives word_perplexity,
byte_perplexity and bits_per_byte, the same as `python -m analysis.perplexity --documents`. The
second shows 24 words of a paragraph and asks which of four endings of 12 words continues it.
"""

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from base.command_line import cli, parse
from base.errors import UserError, too_small
from base.files import write_whole
from text.token_files import data_folder, documents_of, load_data

# Words, words, and choices. They are short enough for small models.
CONTEXT, ENDING, ENDINGS = 24, 12, 4

LIKELIHOOD = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


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
    """the largest number of questions in the second task"""
    seed: int = 0
    """determines which wrong endings are drawn"""

    def problems(self) -> list[str]:
        found = []
        if len(self.dataset) != 1:
            found.append("name one prepared folder, such as wikitext2")
        if not self.to:
            found.append("name the folder to write to with --to=DIR")
        return found + too_small(self, questions=ENDINGS)


def questions(texts: list[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Makes at most `count` questions from long paragraphs, spread evenly over the texts."""
    rng = random.Random(seed)
    lines = "\n".join(texts).splitlines()
    chosen = [words for line in lines if len(words := line.split()) >= CONTEXT + ENDING]
    if len(chosen) > count:
        chosen = [chosen[i * len(chosen) // count] for i in range(count)]
    made = []
    for i, words in enumerate(chosen):
        others = chosen[:i] + chosen[i + 1 :]
        others = rng.sample(others, min(ENDINGS - 1, len(others)))
        endings = [w[CONTEXT : CONTEXT + ENDING] for w in (words, *others)]
        order = rng.sample(range(len(endings)), len(endings))
        choices = [" ".join(endings[k]) for k in order]
        made.append(
            {"context": " ".join(words[:CONTEXT]), "choices": choices, "answer": order.index(0)}
        )
    return made


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], how: dict[str, Any]) -> None:
    """Writes a task: a file with its rows, and a YAML file that describes it."""
    file = folder / f"{name}.jsonl"
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "metadata": {"version": 1},
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        **how,
    }
    write_whole(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))


def main() -> None:
    (c,) = parse(sys.argv[1:], HarnessConfig, words="dataset")
    data = load_data(data_folder(c.dataset[0]))
    if c.split not in data.splits:
        raise UserError(f"{data.folder} has no split {c.split}: it has {', '.join(data.splits)}")
    words = data.load_tokenizer()
    texts = [words.decode(ids[1:]) for ids in documents_of(data, c.split)]
    asked = questions(texts, c.questions, c.seed)
    if len(asked) < ENDINGS:
        raise UserError(
            f"{data.folder} {c.split} has {len(asked)} paragraphs of at least {CONTEXT + ENDING}"
            f" words, and a choice needs {ENDINGS}: use a longer split"
        )
    to, name = Path(c.to).resolve(), f"{data.folder.name}_{c.split}"
    try:
        to.mkdir(parents=True, exist_ok=True)
        write_task(to, name, [{"text": text} for text in texts], LIKELIHOOD)
        print(f"wrote {to / name}.yaml: {len(texts)} documents")
        write_task(to, f"{name}_choice", asked, CHOICE)
        print(f"wrote {to / name}_choice.yaml: {len(asked)} questions")
    except OSError as error:
        raise UserError(f"to={c.to} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    cli(main)
