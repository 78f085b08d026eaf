# Every target makes its own environment first; only Python 3.11 (or newer) and make are needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
# uv installs no bytecode. Where this is set, every process would compile PyTorch's sources again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help demo test test-slow lint format bench bench-gpu gpu faults multinode study study-budget study-optimizers study-algorithmic study-vision study-toy docs clean

help:
	@echo "make demo       prepares text, trains two small models, writes out/demo/report.html (4 to 6 minutes on 2 cores)"
	@echo "make test       runs the tests (3 to 7 minutes on 2 cores)"
	@echo "make test-slow  runs the slow tests: lm-evaluation-harness, faults, kernels for other GPUs (10 to 15 minutes)"
	@echo "make lint       builds the docs, runs ruff and mypy; make format fixes what ruff can fix"
	@echo "make bench      measures speed and memory (about an hour on 2 cores); make bench-gpu compiles the CUDA kernels"
	@echo "make gpu        measures what needs a GPU: kernels, speed of heads and of training, NCCL, sampling (9 minutes a call)"
	@echo "make faults     breaks real runs and compares them with unbroken ones (about half an hour; full disks need root)"
	@echo "make multinode  trains on two network namespaces and cuts the network between them (3 minutes; needs root)"
	@echo "make study      runs the study of heads (about eight hours on 2 cores; if you stop it, the next call continues)"
	@echo "make study-budget       trains heads on 0.6 to 20 million tokens (over a day on 2 cores; the next call continues)"
	@echo "make study-optimizers   compares Muon with AdamW, with a sweep of learning rates (three hours)"
	@echo "make study-algorithmic  runs addition, lattice and permutations (over half an hour)"
	@echo "make study-vision       trains image classifiers (half an hour)"
	@echo "make study-toy          trains prototypes on points of the plane (six minutes)"
	@echo "make docs       builds the documentation as a site with a search and a reference: site/index.html"
	@echo "make clean      removes caches; data/, out/ and .venv/ stay"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m base.install requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m base.install requirements-dev.txt
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed requirements-docs.txt
	$(RUN) -m base.install requirements-docs.txt
	@touch $@

# A second `make demo` continues what is not finished. If all is finished, it only samples again and prints where the report is.
demo: $(VENV)/installed data/wiki/meta.json
	@echo "Two trainings, a few minutes each. You can stop at any time. The next make demo continues where it stopped."
	$(RUN) train.py configs/demo.yaml --head=cross_entropy --head_init_std=0.05 --out_dir=out/demo/cross_entropy --init_from=auto
	$(RUN) train.py configs/demo.yaml --head=cosine --out_dir=out/demo/cosine --init_from=auto
	$(RUN) sample.py --out_dir=out/demo/cross_entropy --start="The city of" --max_new_tokens=60
	$(RUN) sample.py --out_dir=out/demo/cosine --start="The city of" --max_new_tokens=60
	@test out/demo/report.html -nt out/demo/cosine/metrics.jsonl || $(RUN) -m analysis.report out/demo/cross_entropy out/demo/cosine --out=out/demo/report.html
	@echo "the report: out/demo/report.html"

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist=worksteal

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -q -m slow

# Also builds the site, because `make docs` stops at each warning.
lint: $(VENV)/installed-dev docs
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(VENV)/installed-dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(VENV)/installed data/wiki/meta.json
	$(RUN) -m benchmarks.head
	$(RUN) -m benchmarks.head --growth=true --sizes=512x50304x768 --out=results/head_growth.csv
	$(RUN) -m benchmarks.train_speed
	$(RUN) -m benchmarks.scaling
	$(RUN) -m benchmarks.parity
	if [ -d out/demo/cross_entropy ]; then $(RUN) -m benchmarks.swap out/demo/cross_entropy; fi

# The code that the CUDA kernels compile to: registers and spills, without a GPU.
bench-gpu: $(VENV)/installed-dev
	$(RUN) -m benchmarks.gpu_compile

# Rows that results/gpu.csv has for this card and this code are not measured again. Call it again for what had no time left.
gpu: $(VENV)/installed
	$(RUN) -m benchmarks.gpu --minutes=9

# Rows that results/faults.csv has are not tried again; delete it to begin anew.
faults: $(VENV)/installed data/wiki/meta.json
	$(RUN) -m tests.faults.storm

multinode: $(VENV)/installed data/wiki/meta.json
	$(RUN) -m tests.faults.multinode

# Runs that results/heads.csv has are not repeated.
study: $(VENV)/installed data/wikitext2/meta.json data/imdb_bpe/meta.json
	$(RUN) -m studies.heads
	$(RUN) -m studies.heads_report

study-budget: $(VENV)/installed data/wiki/meta.json data/wikitext2/meta.json data/imdb_bpe/meta.json
	$(RUN) -m studies.budget
	$(RUN) -m studies.budget_report
	$(RUN) -m studies.ends

study-optimizers: $(VENV)/installed data/wiki/meta.json
	$(RUN) -m studies.optimizers

study-algorithmic: $(VENV)/installed
	$(RUN) -m studies.algorithmic
	$(RUN) -m studies.algorithmic_report

study-vision: $(VENV)/installed
	$(RUN) -m studies.vision
	$(RUN) -m studies.vision_report

study-toy: $(VENV)/installed
	$(RUN) -m studies.toy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "the site: site/index.html; with its search: python3 -m http.server --directory site"

data/wikitext2/meta.json: | $(VENV)/installed
	$(RUN) prepare_openwebtext.py --source=wikitext2 --tokenizer=bpe:4096 --out_dir=data/wikitext2

data/imdb_bpe/meta.json: | $(VENV)/installed
	$(RUN) prepare_openwebtext.py --source=imdb --tokenizer=bpe:4096 --out_dir=data/imdb_bpe

data/wiki/meta.json: | $(VENV)/installed
	$(RUN) prepare_openwebtext.py --source=wiki --tokenizer=bpe:4096 --out_dir=data/wiki

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
