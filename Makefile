.PHONY: setup test test-slow lint table1 clean

setup:            ## create .venv with everything that tests need
	./scripts/setup_env.sh dev

test: setup       ## the test suite (under 8 minutes on 2 cores)
	.venv/bin/python -m pytest

test-slow: setup  ## what takes longer
	.venv/bin/python -m pytest -m slow

lint: setup       ## ruff
	.venv/bin/python -m ruff check . && .venv/bin/python -m ruff format --check .

table1:           ## Table 1 at laptop scale
	./reproduce.sh table1

clean:            ## remove the environment, caches and outputs
	rm -rf .venv outputs .pytest_cache .ruff_cache .hypothesis
