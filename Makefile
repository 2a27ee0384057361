# make demo   export the sample checkpoint and ask it a question
# make test   lint, types and the fast tests (builds the plugin library first)
# make check  prove the numerics of the demo's bundle; out/check.html is the report
# make bench  speed and memory at LLaDA2.0-mini's size, against a peer and the machine's limits; out/bench
# make cpu-ops  libdmoe_cpu.so, experts and linear layers on the CPU; half a minute
# make plugins  libdmoe_plugins.so for every GPU generation; needs no GPU and no TensorRT
# make fuzz    5 500 hostile files, command lines and calls: the table of what became of them; under 30 minutes
# make sanitize   the CPU kernels' tests under address and undefined-behaviour sanitizers
# make test-triton  a real Triton server runs the sample; installs it first (0.6 GB)
# make lm-eval   lm-eval asks a server, and a bundle, the sample's 400 held-out questions; installs it first
# make test-ray   replicas that die, scale and are replaced, with real Ray Serve; installs it first, 5 minutes
# make docs   the documentation as a site, build/site; a broken link is an error
# make sbom    what a wheel requires and holds, with licences (CycloneDX)
# make wheel   dist/: one wheel with the libraries for CPU and GPU, to be installed on a device
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPU_OPS := dmoe_export/lib/libdmoe_cpu.so
QUESTION ?= tom has 12 apples and buys 7 more. how many apples does tom have?

.PHONY: demo cpu-ops check bench bench-peer bench-decode test lint types plugins ort-ops sbom wheel engines test-slow test-page accuracy bench-export bench-build gpu-test gpu-bench rehearse fuzz fuzz-quick sanitize docs lm-eval test-ray test-triton clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "No venv module: apt-get install python3-venv"; exit 3; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -C wheel.cmake=false -C editable.mode=inplace \
		-e '.[cpu,export,rtx,check,docs,dev]'
	sed -i '/^import /d' $(VENV)/lib/python*/site-packages/*editable*dmoe_export.pth  # a path: PYTHONPATH comes before it
	touch $(READY)

out/sample.bundle/manifest.json: $(READY) $(CPU_OPS) samples/tiny-dmoe/model.safetensors
	$(BIN)/dmoe-export export samples/tiny-dmoe --out out/sample.bundle --force

demo: out/sample.bundle/manifest.json
	$(BIN)/dmoe-export inspect out/sample.bundle
	@echo; echo "> $(QUESTION)"
	$(BIN)/dmoe-export generate out/sample.bundle --prompt "$(QUESTION)" --max-new-tokens 32

check: out/sample.bundle/manifest.json
	$(BIN)/dmoe-export check out/sample.bundle --reference samples/tiny-dmoe --report out/check.html

bench-decode: out/sample.bundle/manifest.json
	$(BIN)/dmoe-export bench decode out/sample.bundle --prompts-file samples/tiny-dmoe/held_out.jsonl --limit 100 \
		--max-new-tokens 32 --cache none,block --out out/decode.json --plot out/decode.png

PLUGINS := dmoe_export/lib/libdmoe_plugins.so
SOURCES := $(shell find plugins -type f ! -name '*.md')

# $(call compiled,CONFIGURE,BUILD): presets of plugins/CMakePresets.json, installed into the package; CMake and Ninja come
# with the dev extra.
compiled = cd plugins && export PATH="$(abspath $(BIN)):$$PATH" && cmake --preset $(1) > /dev/null \
	&& cmake --build --preset $(2) && cmake --install ../build/$(1) --component $(2)

plugins: $(PLUGINS)

$(PLUGINS): $(READY) $(SOURCES)
	$(call compiled,cuda,cuda)
	touch $@

# Kernels of ONNX Runtime's CPU provider; without a C++ compiler its own ops take their place.
cpu-ops: $(CPU_OPS)

$(CPU_OPS): $(READY) $(SOURCES)
	if command -v "$${CXX:-c++}" > /dev/null; then $(call compiled,cpu,cpu) && touch ../$@; \
	else echo "There is no C++ compiler (apt-get install g++): going on with ONNX Runtime's own ops."; fi

ort-ops: $(READY)
	$(call compiled,cuda,onnxruntime-cuda)

# What the wheel requires and holds, with licences: read from an environment that has the requirements and nothing else.
SBOM := build/sbom/dmoe-export.cdx.json

sbom: $(SBOM)

$(SBOM): $(READY) pyproject.toml constraints.txt plugins/cmake/sbom.py
	$(PYTHON) -m venv --clear build/sbom/venv
	build/sbom/venv/bin/python -m pip install --quiet -c constraints.txt -C wheel.cmake=false .
	build/sbom/venv/bin/python -m pip uninstall --quiet --yes dmoe-export setuptools pip
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible --of JSON -o $@ \
		build/sbom/venv/bin/python
	$(BIN)/python plugins/cmake/sbom.py $@ --cuda

wheel: $(PLUGINS) $(SBOM)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist \
		-C cmake.define.DMOE_CUDA=ON -C cmake.define.DMOE_SBOM=$(abspath $(SBOM)) -C build-dir=build/cuda .

engines: out/sample.bundle/manifest.json $(PLUGINS)
	$(BIN)/dmoe-export build samples/tiny-dmoe --out out/sample-fp16.bundle --force
	$(BIN)/dmoe-export inspect out/sample-fp16.bundle

# Two workers, each with files of its own (the longest first, tests/conftest.py) and one thread for torch.
test: $(READY) $(PLUGINS) $(CPU_OPS) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu and not alone'
	$(BIN)/python -m pytest -m alone

# CASES, SEED: how many, and which (the same ones for the same seed). fuzz-quick is for landing, in two minutes.
CASES ?= 5500
SEED ?= 0
FUZZ = OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR):$(CURDIR)/tests" $(BIN)/python -m fuzz

fuzz: $(READY) $(CPU_OPS)
	$(FUZZ) --cases $(CASES) --seed $(SEED) --json out/fuzz.json

fuzz-quick: $(READY) $(CPU_OPS)
	$(FUZZ) --cases 500 --seconds 120 --real-traces 0

sanitize: $(READY)
	plugins/sanitize.sh $(BIN)/python

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck --external-sources samples/deploy/*.sh benchmarks/*.sh benchmarks/device/*.sh plugins/*.sh \
		benchmarks/device/stand_in/nvidia-smi

types: $(READY)
	$(BIN)/mypy

# Pictures of it are in out/page; needs chromium.
test-page: $(READY)
	PAGE_PICTURES=$(abspath out/page) $(BIN)/python -m pytest -m slow tests/serving/test_page_browser.py

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The sample's held-out questions by lm-eval, against a server and in its process; it brings 0.8 GB and has an environment
# of its own.
LM_EVAL := .venv-lm-eval

$(LM_EVAL)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet -C wheel.cmake=false '.[eval]' 'lm-eval[api]==0.4.13'
	$(LM_EVAL)/bin/python -m pip uninstall --quiet --yes dmoe-export  # the checkout is on PYTHONPATH
	touch $@

lm-eval: $(READY) $(CPU_OPS) $(LM_EVAL)/.ready
	$(BIN)/python -m pytest -m slow tests/serving/test_lm_eval.py tests/bench/test_lm_eval_adapter.py

# Real Ray Serve, in an environment of its own of 0.6 GB; what it measured is in out/ray.
RAY := .venv-ray

$(RAY)/.ready: pyproject.toml
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet -C wheel.cmake=false '.[cpu,ray]'
	$(RAY)/bin/python -m pip uninstall --quiet --yes dmoe-export  # the checkout is on PYTHONPATH
	touch $@

test-ray: $(READY) $(CPU_OPS) $(RAY)/.ready
	$(BIN)/python -m pytest -m slow tests/serving/test_ray_serve.py

# A real Triton server, from the wheel nvidia-pytriton, which wants NumPy 1: in an environment of its own. NumPy 2 lies
# beside it, to be refused.
TRITON := .venv-triton

$(TRITON)/.ready: pyproject.toml
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet 'nvidia-pytriton==0.7.0' 'tritonclient[grpc]>=2.50'
	$(TRITON)/bin/python -m pip install --quiet -C wheel.cmake=false -C editable.mode=inplace -e '.[cpu,triton]'
	sed -i '/^import /d' $(TRITON)/lib/python*/site-packages/*editable*dmoe_export.pth
	$(TRITON)/bin/python -m pip install --quiet --no-deps --upgrade --target $(TRITON)/numpy2 'numpy>=2'
	touch $@

test-triton: $(READY) $(CPU_OPS) $(TRITON)/.ready
	$(BIN)/python -m pytest -m slow tests/serving/test_triton_server.py

accuracy: out/sample.bundle/manifest.json
	$(BIN)/python samples/evaluate.py out/sample.bundle --json out/accuracy.json

# Everything of docs/benchmarks.md on 4 layers of LLaDA2.0-mini's size, made here: under 10 minutes on 2 quiet cores,
# 12 GB of disk and 16 GB of memory for a while. KEEP=1 keeps the bundle for the next time.
BENCH := out/bench
SIZE := --geometry llada2.0-mini --layers 4 --work $(BENCH)/work

bench: $(READY) $(PLUGINS) $(CPU_OPS)
	$(BIN)/dmoe-export bench step $(SIZE) --active-experts 15,70 --out $(BENCH)/step.json --plot $(BENCH)/step.png
	$(BIN)/dmoe-export bench generate $(SIZE) --coreset 15,all --max-new-tokens 32 --rounds 2 \
		--out $(BENCH)/generate.json --plot $(BENCH)/generate.png
	test -n "$(KEEP)" || rm -rf $(BENCH)/work
	$(BIN)/dmoe-export bench export --layers 2 --work $(BENCH) --out $(BENCH)/export.json
	$(BIN)/dmoe-export bench build --layers 2 --work $(BENCH) --out $(BENCH)/build.json

# Against llama.cpp on the same weights, which is compiled first; 25 GB of disk and 20 GB of memory for a while.
MIXTURE := --geometry llada-moe --layers 4 --precision int8,int4 --cpu-products exact,fast --tokens 32,128
DENSE := --geometry llada-8x1024 --precision fp32,fp16,bf16,int8,int4 --cpu-products exact,fast --tokens 32,128,512

bench-peer: $(READY) $(CPU_OPS)
	$(BIN)/python -m pip install --quiet 'llama-cpp-python>=0.3.36' 'gguf>=0.19'
	$(BIN)/dmoe-export bench forward $(DENSE) --work $(BENCH)/work --out $(BENCH)/forward-dense.json
	$(BIN)/dmoe-export bench forward $(MIXTURE) --work $(BENCH)/work --out $(BENCH)/forward-mixture.json
	test -n "$(KEEP)" || rm -rf $(BENCH)/work

bench-export: $(READY)
	$(BIN)/dmoe-export bench export --work out/bench --out out/bench/export-4.json

gpu-test: $(READY) $(PLUGINS)
	$(BIN)/python -m pytest -m gpu

gpu-bench: $(READY) $(PLUGINS) $(CPU_OPS)
	$(BIN)/python benchmarks/gpu_kernels.py
	$(BIN)/python benchmarks/gpu_residency.py
	$(BIN)/python benchmarks/gpu_generate.py

# What benchmarks/gpu_runbook.md does on a GPU machine, on this one without a GPU; 12 GB of disk, 4 minutes (the first
# time 15).
rehearse: $(READY)
	bash benchmarks/rehearse.sh

bench-build: $(READY) $(PLUGINS)
	$(BIN)/dmoe-export bench build --work out/bench --out out/bench/build-4.json

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site; with search: $(PYTHON) -m http.server --directory build/site"

clean:
	rm -rf out build dist dmoe_export/lib *.egg-info
