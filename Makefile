# `make demo` and `make test` work on a bare clone: Python 3.11+, pip and a C++ compiler.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin

# Threads that wait sleep instead of spinning: on a machine with other work a training step
# on two cores took 0.4 s instead of 3.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint format env clean

demo: env  ## train a plain GPT, port it, generate with vLLM; leaves pictures and reports in out/
	$(BIN)/python examples/train_then_serve.py --out out

test: lint  ## everything; ARGS="-k attention" narrows it
	tools/run_tests.sh $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/typecheck.py

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env:  ## .venv with everything; does nothing when it is up to date
	@$(PYTHON) tools/setup_env.py

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
