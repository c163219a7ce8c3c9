# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help demo test test-tl4 lint format typecheck docs bench bench-peers soak fuzz clean

# The first interpreter that runs and is new enough; 3.11 is the tested one. Override with PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
VENV_TL4 ?= .venv-tl4
VENV_PEERS ?= .venv-peers

# Nothing here needs a model hub, so nothing waits for one.
# For a model from the hub: HF_HUB_OFFLINE=0 make demo ARGS="--model gpt2-small"
export HF_HUB_OFFLINE ?= 1

# One worker per core, one torch thread per worker: small models gain more from that than from threads.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n auto --maxprocesses 8 $(ARGS)

help:
	@echo "make demo       run demo.py offline on the embedded model; writes heatmaps"
	@echo "make test       run the tests (TransformerLens 3.9)"
	@echo "make test-tl4   run the same tests with TransformerLens 4.3"
	@echo "make lint       ruff: rules and formatting"
	@echo "make format     let ruff rewrite what it can"
	@echo "make typecheck  mypy"
	@echo "make docs       build the documentation: build/docs/index.html"
	@echo "make bench      time a sweep against one whole forward per site"
	@echo "make bench-peers  time a sweep against other tools, in an environment of their own"
	@echo "make soak       kill a long sweep until it is done, and compare its bits (minutes)"
	@echo "make fuzz       feed the readers of files with anything: FUZZ_EXAMPLES=20000 inputs for each by"
	@echo "                properties, then FUZZ_RUNS=100000 by coverage, where there is atheris"
	@echo "make clean      remove the environments and everything built"
	@echo "Each makes the environment it needs. More arguments: ARGS='-k sweep'"

demo: $(VENV)/.installed
	$(VENV)/bin/python demo.py $(ARGS)

test: $(VENV)/.installed
	$(call PYTEST,$(VENV))

test-tl4: $(VENV_TL4)/.installed
	$(call PYTEST,$(VENV_TL4))

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

typecheck: $(VENV)/.installed
	$(VENV)/bin/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build -q -f .ci/mkdocs.yml

bench: $(VENV)/.installed
	$(VENV)/bin/python experiments/bench.py $(ARGS)

bench-peers: $(VENV_PEERS)/.installed
	$(VENV_PEERS)/bin/python experiments/bench_peers.py $(ARGS)

soak: $(VENV)/.installed
	$(VENV)/bin/python experiments/soak.py $(ARGS)

fuzz: export FUZZ_EXAMPLES ?= 20000
fuzz: FUZZ_RUNS ?= 100000
fuzz: $(VENV)/.fuzz
	$(VENV)/bin/python -m pytest -n auto -q tests/test_fuzz.py $(ARGS)
	@if $(VENV)/bin/python -c "import atheris" 2>/dev/null; then \
		OMP_NUM_THREADS=1 $(VENV)/bin/python tests/fuzz.py --runs $(FUZZ_RUNS); \
	else echo "There is no atheris for this system or Python: nothing was fuzzed by coverage."; fi

clean:
	rm -rf $(VENV) $(VENV_TL4) $(VENV_PEERS) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The stamp is written last: an install that was cut short is done again, a finished one costs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call INSTALL,$(VENV),.[test$(,)dev],constraints.txt)

# Nothing where atheris has no wheel: the extra asks for none there.
$(VENV)/.fuzz: $(VENV)/.installed
	$(call INSTALL,$(VENV),.[fuzz],constraints.txt)

$(VENV_TL4)/.installed: pyproject.toml constraints-tl4.txt
	$(call INSTALL,$(VENV_TL4),.[test],constraints-tl4.txt)

# The other tools bring what they want; only what they share with us is of the tested set.
$(VENV_PEERS)/.installed: pyproject.toml constraints-tl4.txt
	$(call INSTALL,$(VENV_PEERS),.,constraints-tl4.txt)
	@$(VENV_PEERS)/bin/python -m pip install -qq --disable-pip-version-check pyvene nnsight tdhook -c constraints-tl4.txt

, := ,
define INSTALL
	@test -x $(1)/bin/python || test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name one with make PYTHON=..."; exit 1; }
	@echo "Making the environment $(1) ($(3)); a minute or two."
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -e "$(2)" -c $(3)
	@touch $@
endef
