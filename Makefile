# Everything sets itself up: `make demo` and `make test` on a fresh machine need Python 3.11+ and a package index.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
QUANTISERS := $(VENV)/.quantisers

.PHONY: demo test test-all test-bare lint bench cards docs clean

$(STAMP): pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[timm,train,eval,space,dev]"
	touch $(STAMP)

# Apart from the rest: PEFT imports them wherever they are installed, which costs every process seconds and warnings.
$(QUANTISERS): $(STAMP)
	$(RUN) -m pip install --quiet --editable ".[quantised]"
	touch $(QUANTISERS)

# Fine-tunes a multimodal MoE on real images and questions and loads the result without the package.
demo: $(STAMP)
	$(RUN) scripts/demo.py

# The fast tests; what CI runs.
test: $(QUANTISERS) lint
	$(RUN) -m pytest -m "not slow"

# Everything, the slow tests included.
test-all: $(QUANTISERS) lint
	$(RUN) -m pytest

# A saved checkpoint in an environment that has only torch, transformers and pillow.
test-bare: $(STAMP)
	$(RUN) scripts/test_bare.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Regenerates every table under benchmarks/.
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) benchmarks/dispatch.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/lora_experts.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/lora_tasks.py --seeds 3
	$(RUN) benchmarks/easyvqa.py --recipe easyvqa_demo --seeds 3
	$(RUN) benchmarks/easyvqa.py --recipe smollm2_easyvqa
	OMP_NUM_THREADS=1 $(RUN) benchmarks/anyexperts.py --seeds 3
	OMP_NUM_THREADS=1 $(RUN) benchmarks/evomoe.py --seeds 3

# Regenerates the cards in model_cards/ from the runs of the recipes, which are run where they are missing.
cards: $(STAMP)
	$(RUN) scripts/model_cards.py

# Regenerates the configuration reference from the code.
docs: $(STAMP)
	$(RUN) scripts/config_reference.py

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
