VENV := .venv
BIN := $(VENV)/bin
# On Linux the default torch wheel brings CUDA with it; TORCH_INDEX=<url> takes it from another wheel index.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# A file's tests share servers and finished jobs, so files go to one process each; three, for many of them wait.
IN_PARALLEL := -n 3 --dist loadfile

.PHONY: demo serve test lint coverage slow soak bench clean

demo: $(VENV)/installed
	@exec $(BIN)/rankscope demo

serve: $(VENV)/installed
	@exec $(BIN)/rankscope serve

test: lint
	$(BIN)/python -m pytest -q $(IN_PARALLEL)

# Apart, because it slows every process down.
coverage: $(VENV)/installed
	$(BIN)/python -m pytest -q $(IN_PARALLEL) --cov --cov-report=term

slow: $(VENV)/installed
	$(BIN)/python -m pytest -q $(IN_PARALLEL) -m 'slow and not soak'

soak: $(VENV)/soak
	$(BIN)/python -m fuzz.formats --seconds 200
	$(BIN)/python -m pytest -q -m soak

bench: $(VENV)/ray
	$(BIN)/python -m benchmarks

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/installed: pyproject.toml constraints.txt
	python3.11 -m venv $(VENV)
	$(PIP_INSTALL) -e '.[worker,dev]'
	@touch $@

$(VENV)/ray: $(VENV)/installed
	$(PIP_INSTALL) -e '.[worker,dev,ray]'
	@touch $@

$(VENV)/soak: $(VENV)/ray
	$(PIP_INSTALL) -e '.[worker,dev,ray,soak]'
	@touch $@
