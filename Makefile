# make demo   export the sample checkpoint and ask it a question
# make test   lint, types and the fast tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUESTION ?= tom has 12 apples and buys 7 more. how many apples does tom have?

.PHONY: demo test lint types test-slow accuracy bench-export clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "No venv module: apt-get install python3-venv"; exit 3; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[export,dev]'
	touch $(READY)

out/sample.bundle/manifest.json: $(READY) samples/tiny-dmoe/model.safetensors
	$(BIN)/dmoe-export export samples/tiny-dmoe --out out/sample.bundle --force

demo: out/sample.bundle/manifest.json
	$(BIN)/dmoe-export inspect out/sample.bundle
	@echo; echo "> $(QUESTION)"
	$(BIN)/dmoe-export generate out/sample.bundle --prompt "$(QUESTION)" --max-new-tokens 32

test: $(READY) lint types
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

accuracy: out/sample.bundle/manifest.json
	$(BIN)/python samples/evaluate.py out/sample.bundle --json out/accuracy.json

bench-export: $(READY)
	$(BIN)/python benchmarks/export_memory.py --work out/export-memory --out out/export-memory.json

clean:
	rm -rf out build dist *.egg-info
