# One virtual environment, one incremental build. `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv pip install -q --python $(BIN)/python

.PHONY: demo test mutations bench lint build
demo: build
	$(BIN)/pgn-fast demo
test: build lint
	$(BIN)/pytest
	$(BIN)/pytest bench/ --benchmark-disable
	$(BIN)/python tests/mutations.py --sanitize
# seeds bugs into the C++ kernels and expects the tests to see each
mutations: build
	$(BIN)/python tests/mutations.py
bench: build
	$(BIN)/pytest bench/ --benchmark-only
lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu*' 'tests/cuda_host/*.h' 'tests/cuda_host/*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy pgn_fast
build: $(VENV)/.ready
	$(UV) --no-build-isolation --no-deps -e .
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q uv
	$(UV) -r pyproject.toml --extra dev
	touch $@
