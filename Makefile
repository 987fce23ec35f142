# Two commands: `make demo` trains a model on two ranks, `make test` runs the checks that CI runs.
PYTHON ?= python3
RANKS ?= 2
JOBS ?= 2
BIN := .venv/bin

.PHONY: demo test long nightly bench page clean

demo: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m graphopt.examples.train_language_model

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

long: .venv/ready
	$(BIN)/python -m pytest -m long

nightly: .venv/ready
	$(BIN)/python -m tests.equivalence.campaign --examples 2000 --jobs $(RANKS)

bench: .venv/ready
	$(BIN)/python -m bench train

# The page of graphopt-inspect, anew after a change of its sources; needs Node.
page:
	cd graphopt/inspect/web && npm ci && npm run check && npm test && npm run build

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples,test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
